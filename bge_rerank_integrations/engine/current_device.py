"""Makes a CUDA device current for a thread."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device current in this block. For other devices the block does nothing.

    Torch's own operators use the device of their tensors. Kernels that are written in Python, new streams and
    CUDA graphs use the current device instead.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
