"""The ways a linear layer can run, behind one call."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]
"""[..., in] to [..., out]."""

LinearFactory = Callable[[Tensor, Tensor], Linear]
"""Weight [out, in] and bias [out] to a `Linear` that may keep the weight in a layout of its own."""

# oneDNN lays a weight out for a number of rows; it serves other numbers as well.
_TYPICAL_ROWS = 512


def resolve_linear(device: torch.device, dtype: torch.dtype) -> LinearFactory:
    """Choose how linear layers run on a device in a precision, and log it."""
    factory = onednn_linear if _has_onednn(device, dtype) else plain_linear
    logger.info("linear layers on %s in %s: %s", device, dtype, factory.__name__)
    return factory


def plain_linear(weight: Tensor, bias: Tensor) -> Linear:
    """`torch.nn.functional.linear`; runs anywhere."""

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return linear


def onednn_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run through oneDNN with the weight laid out once beforehand, as torch's own compiler does.

    Through `F.linear` float32 goes to MKL, which is half as fast on AMD processors, and bfloat16 lays
    the weight out anew in each call.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)

    def linear(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result

    return linear


def _has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
