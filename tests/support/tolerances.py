"""How far a fast path's logits may lie from the plain model's: once per dtype, used by every parity test."""

from __future__ import annotations

from typing import Final

import torch

LOGIT_TOLERANCE: Final = {
    torch.float32: 1e-5,
    # Eight bits of mantissa through every layer; the logits they are tried on spread by 0.8.
    torch.bfloat16: 0.08,
    torch.float16: 0.01,
    # A 255th of each row's spread, in every product.
    torch.int8: 0.15,
    # Three bits of mantissa in every product, and on the random checkpoint few terms to even it out.
    torch.float8_e4m3fn: 0.6,
}
