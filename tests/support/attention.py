"""Stand-ins for attention kernels that need a GPU: plain attention behind the same operators."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bge_rerank_integrations.engine.attention import (
    efficient_attention,
    flash_attention,
    varlen_attention,
)
from bge_rerank_integrations.engine.cpu.vector_support import has_avx2
from bge_rerank_integrations.engine.packing import Seqlens

needs_num_splits = pytest.mark.skipif(
    "num_splits" not in inspect.signature(varlen_attn).parameters,
    reason="needs a torch whose varlen_attn has num_splits",
)
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba (pip install numba)")
FLOAT32_ON_CPU = "tile_attention" if find_spec("numba") is not None and has_avx2() else "sdpa_attention"
"""Name of the implementation that this machine uses in float32 on its CPU, for heads of 64."""


def _has_pairs() -> bool:
    if find_spec("numba") is None:
        return False
    from bge_rerank_integrations.engine.cpu.compiler import HAS_PAIRS

    return HAS_PAIRS


HAS_PAIRS = _has_pairs()
"""Whether the kernels of numba multiply pairs of bfloat16 on this machine."""
needs_pairs = pytest.mark.skipif(not HAS_PAIRS, reason="needs numba, and AMX or an AMD CPU since Zen 4")
BFLOAT16_ON_CPU = "bfloat16_tile_attention" if HAS_PAIRS else "matmul_attention"
"""Name of the implementation that this machine uses in bfloat16 on its CPU, for heads of 64."""
WHOLE_BATCH = [
    flash_attention,
    pytest.param(varlen_attention, marks=needs_num_splits),
    efficient_attention,
]
"""Attention in one call for a whole batch, of torch itself."""

# Kept before any test replaces it.
_exact_sdpa = F.scaled_dot_product_attention


def attend_bounds(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, kv_bounds: Tensor, max_q: int, max_kv: int
) -> Tensor:
    """Attention that reads only the bounds of the sequences, as kernels for the whole batch do.

    The rows of an empty sequence, and rows after `max_q`, stay NaN.
    """
    assert q_bounds.dtype is kv_bounds.dtype is torch.int32
    output = torch.full(q.shape, float("nan"), dtype=q.dtype)
    starts, kv_starts = q_bounds.tolist(), kv_bounds.tolist()
    for i in range(len(starts) - 1):
        rows = slice(starts[i], min(starts[i + 1], starts[i] + max_q))
        columns = slice(kv_starts[i], min(kv_starts[i + 1], kv_starts[i] + max_kv))
        if kv_starts[i] < kv_starts[i + 1]:
            query, key, value = (part.transpose(0, 1) for part in (q[rows], k[columns], v[columns]))
            output[rows] = _exact_sdpa(query, key, value).transpose(0, 1)
    return output


def bounds_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Attention that reads only tensors and `max_seqlen`. Empty sequences give NaN."""
    bounds = q_seqlens.cu_seqlens, kv_seqlens.cu_seqlens
    return attend_bounds(q, k, v, *bounds, q_seqlens.max_seqlen, kv_seqlens.max_seqlen)


@contextmanager
def cuda_operators_on_cpu() -> Iterator[list[str]]:
    """Make torch's own CUDA operators run on the CPU. Yields the names of the operators as they are called."""
    called: list[str] = []

    def flash(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        dropout: float, causal: bool, debug: bool, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        called.append("flash")
        assert (dropout, causal, debug) == (0.0, False, False)
        assert q.shape[-1] % 8 == 0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        nothing = torch.empty(0)
        return attend_bounds(q, k, v, cu_q, cu_k, max_q, max_k), nothing, nothing, nothing, nothing

    def efficient(
        q: Tensor, k: Tensor, v: Tensor, bias: None, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        dropout: float, mask: int, **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:  # fmt: skip
        called.append("efficient")
        assert (bias, dropout, mask) == (None, 0.0, 0)
        assert len(q) == len(k) == len(v) == 1
        assert cu_q.is_contiguous()
        assert cu_k.is_contiguous()
        nothing = torch.empty(0)
        output = attend_bounds(q[0], k[0], v[0], cu_q, cu_k, max_q, max_k)[None]
        return output, nothing, nothing, nothing, max_q, max_k

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash, "CPU")
        library.impl("_efficient_attention_forward", efficient, "CPU")
        yield called


def metal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Act like a faulty Metal kernel: for one query per sequence, it assumes that keys and values are contiguous."""
    if q.shape[2] == 1:
        k, v = (torch.as_strided(rows, rows.shape, _dense_strides(rows)) for rows in (k, v))
    return _exact_sdpa(q, k, v)


def _dense_strides(rows: Tensor) -> tuple[int, ...]:
    # The kernel of torch 2.8 to 2.11 reads the strides of heads and rows, but derives that of sequences.
    return rows.shape[1] * rows.stride(1), *rows.stride()[1:]
