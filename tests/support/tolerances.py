"""Largest allowed difference of logits from the plain model, for each dtype. Every parity test uses it."""

from __future__ import annotations

from typing import Final

import torch

LOGIT_TOLERANCE: Final = {
    torch.float32: 1e-5,
    # Every layer rounds to eight or eleven bits of mantissa. The logits of the random checkpoint spread by 0.8.
    # The model of transformers itself, in these precisions on a GPU, differs by up to this much from float32
    # over twelve seeds of random ids.
    torch.bfloat16: 0.087,
    torch.float16: 0.013,
    # Every product rounds its input to 1/255 of the spread of a row. The random checkpoint is narrow, so few
    # errors cancel out.
    torch.int8: 0.2,
    # Every product rounds to three bits of mantissa.
    torch.float8_e4m3fn: 0.6,
}
