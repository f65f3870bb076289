"""Implementations of a linear layer behind one signature."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.cpu.shared_work import share
from bge_rerank_integrations.engine.cpu.vector_support import has_fast_tiles
from bge_rerank_integrations.engine.padded_rows import round_up_rows
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

logger = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]
"""Maps [rows, in] to [rows, out]."""

LinearFactory = Callable[[Tensor, Tensor], Linear]
"""Makes a `Linear` from a weight [out, in] and a bias [out]. It may store the weight in its own layout."""


# oneDNN chooses the layout of a weight for this number of rows. The layout also works for other numbers.
_TYPICAL_ROWS = 512
# If a batch has fewer pairs than threads, the threads share each product. `share` takes 0.1 to 0.3 ms to
# start and join them. By an estimate (benchmarks/LOG.md, 40), MKL is faster for a short pair with more
# threads.
_MAX_TILE_THREADS = 4
# Largest absolute difference between two implementations for a product of a few small numbers.
_TOLERANCE = 1e-3


def resolve_linear(device: torch.device, dtype: torch.dtype, num_threads: int) -> LinearFactory:
    """Choose the implementation of linear layers, and log the choice.

    Args:
        device: The device that the model runs on.
        dtype: The precision of the products.
        num_threads: Number of CPU threads that compute.
    """
    make = _choose(device, dtype, num_threads)
    logger.info("linear layers on %s in %s: %s", device, dtype, make.__name__)
    return make


def plain_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run `torch.nn.functional.linear`; works on every device."""

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return linear


def onednn_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run oneDNN with a weight that is reordered once at load time, as torch's own compiler does.

    On CPUs with AVX-512, `F.linear` is slower. It multiplies float32 with MKL, which is half as fast on AMD
    processors. It reorders a bfloat16 weight in each call.

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


def tile_linear(weight: Tensor, bias: Tensor) -> Linear:
    """Run this package's own products on register tiles, on CPUs with AVX2 or AVX-512."""
    # numba is an optional dependency, and compiles the kernels in this module when it is imported.
    from bge_rerank_integrations.engine.cpu.float32_products import multiply_panels, pack_panels

    panels = pack_panels(weight.numpy(), bias.numpy())
    num_channels = len(weight)

    def linear(x: Tensor) -> Tensor:
        result = torch.empty(len(x), num_channels, dtype=torch.float32)
        rows, product = x.contiguous().numpy(), result.numpy()
        share(lambda first, end: multiply_panels(rows, panels, first, end, product), len(panels))
        return result

    return linear


def _choose(device: torch.device, dtype: torch.dtype, num_threads: int) -> LinearFactory:
    if device.type != "cpu":
        return plain_linear
    if dtype is torch.float32:
        has_avx2_only = torch.backends.cpu.get_cpu_capability() == "AVX2"
        may_use_tiles = num_threads <= _MAX_TILE_THREADS and find_spec("numba") is not None
        if may_use_tiles and (has_avx2_only or has_fast_tiles()) and _is_tile_linear_right():
            return tile_linear
        # On AVX2, oneDNN multiplies floats more slowly than MKL (benchmarks/LOG.md, 39), and MKL more slowly
        # than `tile_linear` (40).
        if has_avx2_only and torch.backends.mkl.is_available():
            return plain_linear
    return onednn_linear if _has_onednn(dtype) else plain_linear


def _is_tile_linear_right() -> bool:
    """Return whether `tile_linear` agrees with `plain_linear` on this machine. If not, log why."""
    generator = torch.Generator().manual_seed(0)
    # More rows than a tile, and a last panel of the weight that is not full.
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float32, generator=generator) for shape in ((8, 40), (72, 40), (72,))
    )
    try:
        from bge_rerank_integrations.engine.cpu.compiler import HAS_AVX2

        if not HAS_AVX2:
            raise RuntimeError("the settings of numba exclude AVX2")
        difference = (tile_linear(weight, bias)(x) - plain_linear(weight, bias)(x)).abs().max().item()
        if not difference <= _TOLERANCE:
            raise AssertionError(f"results differ by {difference:.2g}")
    except Exception as error:  # numba may not fit the installed release of NumPy
        raise_if_of_signal_handler(error)
        reason = first_line(error)
        logger.warning("linear layers: tile_linear is not used (%s: %s)", type(error).__name__, reason)
        return False
    return True


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
