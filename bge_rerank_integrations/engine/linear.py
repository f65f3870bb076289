"""The ways a linear layer can run, behind one call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]
"""[rows, in] to [rows, out]."""

LinearFactory = Callable[[Tensor, Tensor], Linear]
"""Weight [out, in] and bias [out] to a `Linear` that may keep the weight in a layout of its own."""


class LinearBackend(NamedTuple):
    """A way to run linear layers.

    Attributes:
        make: Makes one.
        num_rows: The number of rows that is best given to them for a number that is wanted.
    """

    make: LinearFactory
    num_rows: Callable[[int], int]


# oneDNN lays a weight out for a number of rows; it serves other numbers as well.
_TYPICAL_ROWS = 512


def resolve_linear(device: torch.device, dtype: torch.dtype) -> LinearBackend:
    """Choose how linear layers run on a device in a precision, and log it."""
    if _has_onednn(device, dtype):
        backend = LinearBackend(onednn_linear, round_up_rows)
    else:
        backend = LinearBackend(plain_linear, int)
    logger.info("linear layers on %s in %s: %s", device, dtype, backend.make.__name__)
    return backend


def plain_linear(weight: Tensor, bias: Tensor) -> Linear:
    """`torch.nn.functional.linear`; runs anywhere."""

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return linear


def onednn_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run through oneDNN with the weight laid out once beforehand, as torch's own compiler does.

    Through `F.linear` float32 goes to MKL, which is half as fast on AMD processors, and bfloat16 lays
    the weight out anew in each call.

    oneDNN compiles a kernel for each number of rows it meets and keeps it, megabytes each and gigabytes
    in all. So rows are filled up to one of a few numbers; whoever gives those saves a copy.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)

    def linear(x: Tensor) -> Tensor:
        num_rows = len(x)
        num_missing = round_up_rows(num_rows) - num_rows
        if num_missing:
            x = F.pad(x, (0, 0, 0, num_missing))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result[:num_rows]

    return linear


def round_up_rows(num_rows: int, *, num_in_octave: int = 8) -> int:
    """Return the next of a few numbers of rows: so many in each octave (a power of two), none below 16.

    Example:
        >>> [round_up_rows(n) for n in (1, 100, 300, 1100)]
        [16, 112, 320, 1152]
    """
    step = max(16, (1 << (num_rows - 1).bit_length()) // (2 * num_in_octave))
    return -(-num_rows // step) * step


def _has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
