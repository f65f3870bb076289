"""Attention between two int8 products: takes the projected queries, keys and values, and returns codes."""

from __future__ import annotations

import numpy as np

from bge_rerank_integrations.engine.cpu.attention_tiles import (
    ROWS_IN_PAIRS,
    attend_tile,
    attend_tile_in_pairs,
    begin_pairs,
    end_pairs,
    make_buffers,
    prepare_pairs,
    store_results,
    transpose_keys,
)
from bge_rerank_integrations.engine.cpu.bfloat16_pairs import pack_columns, pack_row
from bge_rerank_integrations.engine.cpu.compiler import HAS_PAIRS, compiled, inlined
from bge_rerank_integrations.engine.cpu.int8_kernels import quantize_row
from bge_rerank_integrations.engine.cpu.vector_intrinsics import ROWS, WIDTH, widest_vectors


@inlined
def _take(product, affine, offset, bias, first, count, column, width, rows):
    """Restore the values of `count` rows of one head in the flat array `rows`."""
    for i in range(count):
        scale, low = affine[first + i, 0], affine[first + i, 1]
        source = product[first + i, column : column + width]
        offsets, biases = offset[column : column + width], bias[column : column + width]
        target = rows[i * width : (i + 1) * width]
        for d in range(width):
            target[d] = scale * source[d] + (low * offsets[d] + biases[d])


@inlined
def _pair_values(buffers, length, head_dim):
    """Store the values of each two neighbouring rows as pairs of bfloat16."""
    values = buffers.values
    values[length * head_dim : (length + 1) * head_dim] = np.float32(0)  # the last pair may have one row
    for j in range(0, length, 2):
        pack_columns(values, j * head_dim, (j + 1) * head_dim, buffers.pairs, j // 2 * head_dim, head_dim)


@compiled(
    "void(f4[:,::1], f4[:,::1], f4[::1], f4[::1], i4[::1],"
    " f4[:,::1], f4[:,::1], f4[::1], f4[::1], i4[::1], i8, i8, f4[:,::1], u1[:,::1], f4[:,::1])"
)
def attend(
    q_product,
    q_affine,
    q_offset,
    q_bias,
    q_cu_seqlens,
    kv_product,
    kv_affine,
    kv_offset,
    kv_bias,
    kv_cu_seqlens,
    k_column,
    num_heads,
    attended,
    codes,
    affine,
):
    """Compute bidirectional attention within each sequence, and quantize the result.

    Products are in bfloat16 if `HAS_PAIRS` is set and the width of a head is a multiple of 2 * WIDTH, else in
    float32. Sums and the softmax are in float32.

    The inputs are products of codes with int8 weights. `scale * product + low * offset + bias` restores the
    values, as described in `int8_kernels`.

    Args:
        q_product: [Tq, at least width], products for the queries. The first `width` columns are used.
        q_affine: [Tq, 2], scale and low of each row of codes that was multiplied.
        q_offset: [at least width], offset of the query weight.
        q_bias: [at least width], bias of the query projection.
        q_cu_seqlens: int32 [B + 1], for B sequences. Sequence i takes the rows from q_cu_seqlens[i] to
            q_cu_seqlens[i + 1].
        kv_product: [Tkv, k_column + 2 * width], products for the keys, from `k_column` on, and then the
            values.
        kv_affine: [Tkv, 2], scale and low of each row of codes that was multiplied.
        kv_offset: [k_column + 2 * width], offset of the weight.
        kv_bias: [k_column + 2 * width], bias of the projection.
        kv_cu_seqlens: int32 [B + 1], the rows of the same sequences in `kv_product`.
        k_column: First column of the keys.
        num_heads: Number of heads. The width of a head is a multiple of WIDTH.
        attended: [Tq, width], output: the result in float32.
        codes: [Tq, width], output: the quantized result.
        affine: [Tq, 2], output: scale and low of each row of `codes`.
    """
    widest_vectors()
    width = codes.shape[1]
    head_dim = width // num_heads
    rows = ROWS_IN_PAIRS if HAS_PAIRS and head_dim % (2 * WIDTH) == 0 else ROWS
    buffers = make_buffers(kv_cu_seqlens, head_dim, rows)
    if HAS_PAIRS and head_dim % (2 * WIDTH) == 0:
        begin_pairs()
    for b in range(kv_cu_seqlens.shape[0] - 1):
        begin, end, kv_begin = q_cu_seqlens[b], q_cu_seqlens[b + 1], kv_cu_seqlens[b]
        length = kv_cu_seqlens[b + 1] - kv_begin
        for h in range(num_heads):
            column = h * head_dim
            k_start = k_column + column
            v_start = k_start + width
            _take(
                kv_product, kv_affine, kv_offset, kv_bias, kv_begin, length, k_start, head_dim, buffers.keys
            )
            _take(
                kv_product, kv_affine, kv_offset, kv_bias, kv_begin, length, v_start, head_dim, buffers.values
            )
            # The constant stands in both conditions, so that numba never compiles an instruction that the
            # processor does not have.
            if HAS_PAIRS and head_dim % (2 * WIDTH) == 0:
                pack_row(buffers.keys, 0, buffers.keys, 0, length * head_dim)
                _pair_values(buffers, length, head_dim)
                prepare_pairs(buffers, length, head_dim)
            else:
                transpose_keys(buffers, length, head_dim)
            for first in range(begin, end, rows):
                count = min(rows, end - first)
                _take(q_product, q_affine, q_offset, q_bias, first, count, column, head_dim, buffers.queries)
                if HAS_PAIRS and head_dim % (2 * WIDTH) == 0:
                    pack_row(buffers.queries, 0, buffers.queries, 0, count * head_dim)
                    attend_tile_in_pairs(buffers, count, length, head_dim)
                else:
                    attend_tile(buffers, count, length, head_dim)
                store_results(buffers, count, head_dim, attended, first, column)
        for i in range(begin, end):
            quantize_row(attended[i], codes[i], affine[i])
    if HAS_PAIRS and head_dim % (2 * WIDTH) == 0:
        end_pairs()
