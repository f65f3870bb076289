"""Attention within each sequence of a packed batch: the implementations, and the choice of one of them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from bge_rerank_integrations.engine.attention_by_length import (
    contiguous_sdpa_attention,
    matmul_attention,
    product_attention,
    sdpa_attention,
)
from bge_rerank_integrations.engine.attention_trial import try_attention
from bge_rerank_integrations.engine.cpu.amx import has_amx
from bge_rerank_integrations.engine.cpu.vector_support import (
    HEAD_STEP,
    PAIRS_STEP,
    has_avx2,
    has_fast_pairs,
)
from bge_rerank_integrations.engine.packing import Seqlens
from bge_rerank_integrations.errors import DeviceError
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

logger = logging.getLogger(__name__)

_HOPPER: Final = 9  # the major compute capability of H100 and H200
_FLASH_CAPABILITY: Final = (8, 0)
_FLASH_MULTIPLE: Final = 8
_MAX_FLASH_HEAD_DIM: Final = 256
_TRITON_HEAD_DIMS: Final = (16, 32, 64, 128)
_HALF: Final = (torch.float16, torch.bfloat16)
_EFFICIENT_CAPABILITY: Final = (5, 0)
_EFFICIENT_BFLOAT16_CAPABILITY: Final = (8, 0)


class VarlenAttention(Protocol):
    """Bidirectional softmax attention, scaled by the square root of the head dimension."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
        """Compute attention from each query row to the key rows of its own sequence.

        Args:
            q: Queries [Tq, heads, head_dim]. The output for rows after the last sequence, which only CPUs
                have, is zero or any other finite value.
            k: Keys [Tkv, heads, head_dim].
            v: Values [Tkv, heads, head_dim].
            q_seqlens: The layout of the B sequences in `q`.
            kv_seqlens: The layout of the same B sequences in `k` and `v`.

        Returns:
            [Tq, heads, head_dim], contiguous.
        """


def resolve_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> VarlenAttention:
    """Choose the attention implementation for a device and a precision, and log the choice.

    A kernel that exists may still fail or give wrong results with some combinations of device, driver and
    release of torch. This function therefore runs each candidate once, in the order of `CANDIDATES`, and
    returns the first one that agrees with plain attention.

    Args:
        device: The device to run on.
        dtype: The precision of queries, keys and values.
        head_dim: The width of a head.

    Raises:
        DeviceError: No implementation works on the device.
        torch.cuda.OutOfMemoryError: The device has no memory left.
    """
    for candidate in CANDIDATES:
        name = name_of(candidate.attention)
        try:
            if not candidate.fits(device, dtype, head_dim):
                continue
            try_attention(
                candidate.attention, device, dtype, head_dim, works_in_graphs=candidate.works_in_graphs
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that is missing, a driver that fails, or a wrong result
            raise_if_of_signal_handler(error)
            reason = first_line(error)
            logger.warning(
                "attention on %s in %s: %s is not used (%s: %s)",
                device,
                dtype,
                name,
                type(error).__name__,
                reason,
            )
            continue
        logger.info("attention on %s in %s: %s", device, dtype, name)
        if candidate.with_many_threads is not None:
            return _on_one_thread(candidate.attention, candidate.with_many_threads)
        return candidate.attention
    raise DeviceError(
        f"torch {torch.__version__} computes attention on {device} in {dtype} incorrectly or not at all; use "
        "device='cpu', or install another release of torch"
    )


def works_in_graphs(attention: Callable[..., object]) -> bool:
    """Return whether a CUDA graph can capture an implementation."""
    return any(each.attention is attention and each.works_in_graphs for each in CANDIDATES)


def name_of(attention: Callable[..., object]) -> str:
    """Return the name of an implementation for logs and reports."""
    return getattr(attention, "__name__", repr(attention))


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run FlashAttention 3 from the package `flash_attn_interface`, one kernel for the whole batch."""
    from flash_attn_interface import flash_attn_varlen_func

    attended = flash_attn_varlen_func(
        q,
        k,
        v,
        q_seqlens.cu_seqlens,
        kv_seqlens.cu_seqlens,
        q_seqlens.max_seqlen,
        kv_seqlens.max_seqlen,
    )
    # Early releases return the sums of the softmax too.
    output: Tensor = attended[0] if isinstance(attended, tuple) else attended
    return output


def triton_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run this package's own Triton kernel, one kernel for the whole batch; on H100 and H200."""
    from bge_rerank_integrations.engine.cuda.triton_attention import attend

    return attend(q, k, v, q_seqlens.cu_seqlens, kv_seqlens.cu_seqlens, q_seqlens.max_seqlen)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run torch's FlashAttention 2, one kernel for the whole batch."""
    attended, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        q_seqlens.cu_seqlens,
        kv_seqlens.cu_seqlens,
        q_seqlens.max_seqlen,
        kv_seqlens.max_seqlen,
        0.0,  # dropout
        False,  # not causal
        False,  # no debug mask
    )
    output: Tensor = attended
    return output


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run `torch.nn.attention.varlen`, one kernel for the whole batch.

    With `num_splits=1`, a sequence gets the same result in every batch. It also selects FlashAttention. The
    other choice, cuDNN, compiles a plan for each new combination of a number of sequences and a longest
    sequence, and requests would wait for that.
    """
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        q,
        k,
        v,
        q_seqlens.cu_seqlens,
        kv_seqlens.cu_seqlens,
        q_seqlens.max_seqlen,
        kv_seqlens.max_seqlen,
        num_splits=1,
    )
    assert isinstance(attended, Tensor)  # it is a tuple only with auxiliary outputs
    return attended


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run torch's memory-efficient attention, one kernel for the whole batch; also on older GPUs."""
    attended, *_ = torch.ops.aten._efficient_attention_forward(
        q[None],
        k[None],
        v[None],
        None,  # no bias
        q_seqlens.cu_seqlens,
        kv_seqlens.cu_seqlens,
        q_seqlens.max_seqlen,
        kv_seqlens.max_seqlen,
        0.0,  # dropout
        0,  # not causal
    )
    output: Tensor = attended.squeeze(0)
    return output


def tile_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run this package's own kernel in float32, one call for the whole batch; on CPUs with AVX2."""
    if q_seqlens.max_seqlen == 1:
        # The kernel transposes the keys first, which takes longer than it saves for a single query.
        return sdpa_attention(q, k, v, q_seqlens, kv_seqlens)
    from bge_rerank_integrations.engine.cpu.float32_attention import attend

    return attend(q, k, v, q_seqlens, kv_seqlens)


def bfloat16_tile_attention(
    q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens
) -> Tensor:
    """Run this package's own kernel in bfloat16, one call for a batch; with AMX, or on AMD since Zen 4."""
    if q_seqlens.max_seqlen == 1:
        return matmul_attention(q, k, v, q_seqlens, kv_seqlens)
    from bge_rerank_integrations.engine.cpu.bfloat16_attention import attend

    return attend(q, k, v, q_seqlens, kv_seqlens)


def _on_one_thread(attention: VarlenAttention, with_many_threads: VarlenAttention) -> VarlenAttention:
    """Return an implementation that calls another one where torch has several threads.

    The threads of `SplitForward` each compute their own sequences. A batch with fewer sequences than threads
    is computed outside of them, where torch shares each of its own operations between its threads.
    """

    @wraps(attention)
    def attend(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
        chosen = attention if torch.get_num_threads() == 1 else with_many_threads
        return chosen(q, k, v, q_seqlens, kv_seqlens)

    return attend


class Candidate(NamedTuple):
    """An implementation, and where it can run.

    Attributes:
        attention: The implementation.
        fits: Whether it may run on a device, in a precision and with a width of heads. A false answer only
            avoids a trial that is known to fail.
        works_in_graphs: A CUDA graph can capture it. It reads only tensors and `max_seqlen`.
        with_many_threads: The implementation to use when torch has several threads. None if this
            implementation uses all of them itself.
    """

    attention: VarlenAttention
    fits: Callable[[torch.device, torch.dtype, int], bool]
    works_in_graphs: bool = False
    with_many_threads: VarlenAttention | None = None


def _fits_flash_3(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        _is_hopper(device)
        and _flash_supports(dtype, head_dim)
        and find_spec("flash_attn_interface") is not None
    )


def _fits_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        _is_hopper(device)
        and dtype in _HALF
        and head_dim in _TRITON_HEAD_DIMS
        and find_spec("triton") is not None
    )


def _fits_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        _has_cuda(device)
        and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
        and _flash_supports(dtype, head_dim)
        and torch.backends.cuda.is_flash_attention_available()
    )


def _fits_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if not _fits_flash(device, dtype, head_dim):
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "num_splits" in inspect.signature(varlen_attn).parameters  # torch 2.10 does not have it


def _fits_efficient(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:  # noqa: ARG001
    least = _EFFICIENT_BFLOAT16_CAPABILITY if dtype is torch.bfloat16 else _EFFICIENT_CAPABILITY
    return _has_cuda(device) and torch.cuda.get_device_capability(device) >= least


def _fits_matmul(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:  # noqa: ARG001
    return device.type == "cpu" and dtype is torch.bfloat16


def _fits_bfloat16_tiles(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if not (_fits_matmul(device, dtype, head_dim) and head_dim % PAIRS_STEP == 0):
        return False
    if find_spec("numba") is None or not (has_amx() or has_fast_pairs()):
        return False
    from bge_rerank_integrations.engine.cpu.compiler import HAS_PAIRS  # this imports numba

    return HAS_PAIRS


def _fits_tiles(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        device.type == "cpu"
        and dtype is torch.float32
        and head_dim % HEAD_STEP == 0
        and has_avx2()
        and find_spec("numba") is not None
    )


def _has_cuda(device: torch.device) -> bool:
    # Nobody has tried these kernels on AMD devices, where torch has others under the same names.
    return device.type == "cuda" and torch.version.hip is None


def _is_hopper(device: torch.device) -> bool:
    return _has_cuda(device) and torch.cuda.get_device_capability(device)[0] == _HOPPER


def _flash_supports(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in _HALF and head_dim % _FLASH_MULTIPLE == 0 and head_dim <= _MAX_FLASH_HEAD_DIM


CANDIDATES: Final = (
    Candidate(flash_attention_3, _fits_flash_3, works_in_graphs=True),
    # On an H200, it takes 0.63 times as long as `flash_attention`, which is written for older devices.
    Candidate(triton_attention, _fits_triton, works_in_graphs=True),
    # `varlen_attention` runs the same kernel as `flash_attention`, but through a custom operator of Python,
    # which takes longer to call and launches one more kernel. It is the way that stays if torch changes the
    # arguments of its internal operator.
    Candidate(flash_attention, _fits_flash, works_in_graphs=True),
    Candidate(varlen_attention, _fits_varlen, works_in_graphs=True),
    Candidate(efficient_attention, _fits_efficient, works_in_graphs=True),
    # On an AMD processor, it takes 0.3 to 0.7 times as long as `matmul_attention` (benchmarks/LOG.md, 36).
    # With AMX, it is the fastest at every length (benchmarks/LOG.md, 38).
    Candidate(bfloat16_tile_attention, _fits_bfloat16_tiles, with_many_threads=matmul_attention),
    Candidate(matmul_attention, _fits_matmul),
    # On an AMD processor, it takes 0.4 to 0.6 times as long as `sdpa_attention`, and 0.5 to 1.0 times on one
    # without AVX-512 (benchmarks/LOG.md, 39).
    Candidate(tile_attention, _fits_tiles, with_many_threads=sdpa_attention),
    Candidate(sdpa_attention, lambda device, *_: device.type != "mps"),
    Candidate(contiguous_sdpa_attention, lambda device, *_: device.type == "mps"),
    Candidate(product_attention, lambda *_: True),
)
"""All implementations, the fastest first."""
