"""Implementations of a linear layer behind one signature."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]
"""Maps [rows, in] to [rows, out]."""

LinearFactory = Callable[[Tensor, Tensor], Linear]
"""Makes a `Linear` from a weight [out, in] and a bias [out]. It may store the weight in its own layout."""


# oneDNN chooses the layout of a weight for this number of rows. The layout also works for other numbers.
_TYPICAL_ROWS = 512


def resolve_linear(device: torch.device, dtype: torch.dtype) -> LinearFactory:
    """Choose the implementation of linear layers for a device and a precision, and log the choice."""
    make = onednn_linear if _has_onednn(device, dtype) else plain_linear
    logger.info("linear layers on %s in %s: %s", device, dtype, make.__name__)
    return make


def plain_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run `torch.nn.functional.linear`; works on every device."""

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return linear


def onednn_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run oneDNN with a weight that is reordered once at load time, as torch's own compiler does.

    `F.linear` is slower: float32 goes to MKL, which is half as fast on AMD processors with AVX-512, and
    bfloat16 reorders the weight in each call.

    oneDNN compiles a kernel of about a megabyte for each number of rows, and keeps it, which would add up to
    gigabytes. To limit the number of kernels, the layer pads its input to one of a few numbers of rows. An
    input that already has such a number of rows is not copied. `RowBlocks` limits the rows of an input.
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
    """Round a number of rows up to one of a few sizes.

    Args:
        num_rows: The number of rows, at least 1.
        num_in_octave: Number of sizes between a power of two and the next one. Sizes are at least 16 apart.

    Returns:
        The smallest of the sizes that is at least `num_rows`.

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
    # On CPUs without AVX-512, MKL multiplies floats faster (benchmarks/LOG.md, 39).
    return dtype is torch.float32 and not (
        torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )
