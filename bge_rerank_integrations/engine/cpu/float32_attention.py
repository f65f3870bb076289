"""Attention in float32 on register tiles; see `attention_tiles`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_integrations.engine.cpu.attention_tiles import (
    attend_tile,
    make_buffers,
    store_results,
    transpose_keys,
)
from bge_rerank_integrations.engine.cpu.compiler import compiled
from bge_rerank_integrations.engine.cpu.head_rows import flatten_rows, take_rows
from bge_rerank_integrations.engine.cpu.vector_intrinsics import ROWS, widest_vectors
from bge_rerank_integrations.engine.packing import Seqlens


def attend(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Compute attention within each sequence on the calling thread; see `VarlenAttention`."""
    output = torch.empty(q.shape, dtype=torch.float32)
    output[sum(q_seqlens.lengths) :].zero_()
    flat = output.view(len(output), -1).numpy()
    cu_seqlens = q_seqlens.cu_seqlens.numpy(), kv_seqlens.cu_seqlens.numpy()
    _attend(*_flatten(q), *_flatten(k), *_flatten(v), *cu_seqlens, q.shape[1], flat)
    return output


def _flatten(rows: Tensor) -> tuple[npt.NDArray[np.float32], int]:
    flat, step = flatten_rows(rows)
    return flat.numpy(), step


@compiled("void(f4[::1], i8, f4[::1], i8, f4[::1], i8, i4[::1], i4[::1], i8, f4[:,::1])")
def _attend(q, q_step, k, k_step, v, v_step, q_cu_seqlens, kv_cu_seqlens, num_heads, attended):
    """Compute bidirectional attention within each of B sequences.

    Args:
        q: Rows of queries, each `num_heads` heads next to each other, at a distance of `q_step`.
        q_step: See `q`.
        k: Rows of keys.
        k_step: See `q`.
        v: Rows of values.
        v_step: See `q`.
        q_cu_seqlens: int32 [B + 1]. Sequence i takes the rows from q_cu_seqlens[i] to q_cu_seqlens[i + 1].
        kv_cu_seqlens: int32 [B + 1], the rows of the same sequences in `k` and `v`.
        num_heads: Number of heads. The width of a head is a multiple of WIDTH.
        attended: [Tq, width], output.
    """
    widest_vectors()
    head_dim = attended.shape[1] // num_heads
    buffers = make_buffers(kv_cu_seqlens, head_dim, ROWS)
    for b in range(kv_cu_seqlens.shape[0] - 1):
        begin, end, kv_begin = q_cu_seqlens[b], q_cu_seqlens[b + 1], kv_cu_seqlens[b]
        length = kv_cu_seqlens[b + 1] - kv_begin
        for h in range(num_heads):
            column = h * head_dim
            take_rows(k, k_step, kv_begin, length, column, head_dim, buffers.keys)
            take_rows(v, v_step, kv_begin, length, column, head_dim, buffers.values)
            transpose_keys(buffers, length, head_dim)
            for first in range(begin, end, ROWS):
                count = min(ROWS, end - first)
                take_rows(q, q_step, first, count, column, head_dim, buffers.queries)
                attend_tile(buffers, count, length, head_dim)
                store_results(buffers, count, head_dim, attended, first, column)
