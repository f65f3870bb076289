"""Attention in bfloat16 on register tiles; see `attention_tiles`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_integrations.engine.cpu.attention_tiles import (
    ROWS_IN_PAIRS,
    attend_tile_in_pairs,
    begin_pairs,
    end_pairs,
    make_buffers,
    prepare_pairs,
)
from bge_rerank_integrations.engine.cpu.bfloat16_pairs import pack_row, pair_columns
from bge_rerank_integrations.engine.cpu.compiler import compiled, inlined
from bge_rerank_integrations.engine.cpu.head_rows import flatten_rows, take_rows
from bge_rerank_integrations.engine.cpu.vector_intrinsics import widest_vectors
from bge_rerank_integrations.engine.packing import Seqlens


def attend(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Compute attention within each sequence on the calling thread; see `VarlenAttention`."""
    output = torch.empty(q.shape, dtype=q.dtype)
    output[sum(q_seqlens.lengths) :].zero_()
    pairs = output.view(-1).view(torch.float32).numpy()
    cu_seqlens = q_seqlens.cu_seqlens.numpy(), kv_seqlens.cu_seqlens.numpy()
    _attend(*_flatten(q), *_flatten(k), *_flatten(v), *cu_seqlens, q.shape[1], q.shape[2], pairs)
    return output


def _flatten(rows: Tensor) -> tuple[npt.NDArray[np.uint16], int]:
    """Do the same as `flatten_rows` for the bits of the values."""
    flat, step = flatten_rows(rows)
    bits: npt.NDArray[np.uint16] = flat.view(torch.int16).numpy().view(np.uint16)
    return bits, step


@inlined
def _pair_values(source, step, first, count, column, head_dim, pairs):
    """Store the values of one head in each two neighbouring rows as pairs."""
    start = first * step + column
    for i in range(0, count - 1, 2):
        pair_columns(source, start + i * step, start + (i + 1) * step, pairs, i // 2 * head_dim, head_dim)
    if count % 2:
        row = start + (count - 1) * step
        last, target = source[row : row + head_dim], pairs.view(np.uint32)[count // 2 * head_dim :]
        for d in range(head_dim):
            target[d] = last[d]


@compiled("void(u2[::1], i8, u2[::1], i8, u2[::1], i8, i4[::1], i4[::1], i8, i8, f4[::1])")
def _attend(q, q_step, k, k_step, v, v_step, q_cu_seqlens, kv_cu_seqlens, num_heads, head_dim, attended):
    """Compute bidirectional attention within each of B sequences.

    Args:
        q: Bits of rows of queries, each `num_heads` heads next to each other, at a distance of `q_step`.
        q_step: See `q`.
        k: Rows of keys.
        k_step: See `q`.
        v: Rows of values.
        v_step: See `q`.
        q_cu_seqlens: int32 [B + 1]. Sequence i takes the rows from q_cu_seqlens[i] to q_cu_seqlens[i + 1].
        kv_cu_seqlens: int32 [B + 1], the rows of the same sequences in `k` and `v`.
        num_heads: Number of heads.
        head_dim: Width of a head, a multiple of 2 * WIDTH.
        attended: [Tq * num_heads * head_dim // 2], output, pairs of bfloat16.
    """
    widest_vectors()
    buffers = make_buffers(kv_cu_seqlens, head_dim, ROWS_IN_PAIRS)
    queries, keys = buffers.queries.view(np.uint16), buffers.keys.view(np.uint16)
    sums, shares = buffers.sums, buffers.shares
    begin_pairs()
    for b in range(kv_cu_seqlens.shape[0] - 1):
        begin, end, kv_begin = q_cu_seqlens[b], q_cu_seqlens[b + 1], kv_cu_seqlens[b]
        length = kv_cu_seqlens[b + 1] - kv_begin
        for h in range(num_heads):
            column = h * head_dim
            take_rows(k, k_step, kv_begin, length, column, head_dim, keys)
            _pair_values(v, v_step, kv_begin, length, column, head_dim, buffers.pairs)
            prepare_pairs(buffers, length, head_dim)
            for first in range(begin, end, ROWS_IN_PAIRS):
                count = min(ROWS_IN_PAIRS, end - first)
                take_rows(q, q_step, first, count, column, head_dim, queries)
                attend_tile_in_pairs(buffers, count, length, head_dim)
                for i in range(count):
                    for d in range(head_dim):
                        sums[i * head_dim + d] *= shares[i]
                    place = ((first + i) * num_heads + h) * head_dim // 2
                    pack_row(sums, i * head_dim, attended, place, head_dim)
    end_pairs()
