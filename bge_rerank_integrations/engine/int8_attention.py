"""Attention between two int8 products: from the product of queries, keys and values to codes again."""

from __future__ import annotations

import numpy as np

from bge_rerank_integrations.engine.int8_kernels import compiled, greatest_and_least, inlined, quantize_row
from bge_rerank_integrations.engine.tiles import (
    ROWS,
    WIDTH,
    as_float,
    multiply_16,
    multiply_32,
    multiply_64,
    transpose_16,
)

_LOG2_E = 1.4426950408889634


@inlined
def _exp2(x):
    """2 to the power of x <= 0, to 3e-6: of its whole part by bits, of the rest by a polynomial."""
    x = max(x, np.float32(-126))
    whole = np.int32(x - np.float32(0.5))
    rest = x - np.float32(whole)
    p = np.float32(1.3333558e-3)
    p = p * rest + np.float32(9.6181291e-3)
    p = p * rest + np.float32(5.5504109e-2)
    p = p * rest + np.float32(2.4022651e-1)
    p = p * rest + np.float32(6.9314718e-1)
    p = p * rest + np.float32(1)
    return p * as_float((whole + np.int32(127)) << np.int32(23))


@inlined
def _multiply(a, a_step, b, b_step, columns, c, c_step, depth):
    """Compute ROWS rows of c = a b; `columns` is a multiple of WIDTH."""
    j = 0
    while columns - j >= 4 * WIDTH:
        multiply_64(a, 0, a_step, b, j, b_step, c, j, c_step, depth)
        j += 4 * WIDTH
    if columns - j >= 2 * WIDTH:
        multiply_32(a, 0, a_step, b, j, b_step, c, j, c_step, depth)
        j += 2 * WIDTH
    if columns - j >= WIDTH:
        multiply_16(a, 0, a_step, b, j, b_step, c, j, c_step, depth)


@inlined
def _take(product, affine, offset, bias, first, count, column, width, factor, rows):
    """Make `count` rows of one head whole, times a factor, into a flat array of rows."""
    for i in range(count):
        scale, low = affine[first + i, 0], affine[first + i, 1]
        source = product[first + i, column : column + width]
        offsets, biases = offset[column : column + width], bias[column : column + width]
        target = rows[i * width : (i + 1) * width]
        for d in range(width):
            target[d] = (scale * source[d] + (low * offsets[d] + biases[d])) * factor


@inlined
def _softmax_row(row):
    """Replace a row by the powers of 2 of what it is above its greatest, and return one by their sum."""
    greatest, _ = greatest_and_least(row)
    total = np.float32(0)
    for j in range(row.shape[0]):
        power = _exp2(row[j] - greatest)
        row[j] = power
        total += power
    return np.float32(1) / total


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
    """Attend within each of B sequences, bidirectionally, in float32, and quantize.

    Args:
        q_product: [Tq, at least width]: queries first in each row, before they are made whole.
        q_affine: [Tq, 2]: scale and least value of the rows that were multiplied.
        q_offset: Of the weight, as `complete` takes it.
        q_bias: Likewise.
        q_cu_seqlens: [B + 1]: sequence i is rows i to i + 1.
        kv_product: [Tkv, k_column + 2 * width]: keys from `k_column` on, values after them.
        kv_affine: As for queries; so are the three that follow.
        kv_offset: .
        kv_bias: .
        kv_cu_seqlens: .
        k_column: Where keys begin.
        num_heads: Heads, of a multiple of WIDTH each.
        attended: [Tq, width], room for what is quantized.
        codes: [Tq, width], the result.
        affine: [Tq, 2], the result's.
    """
    width = codes.shape[1]
    head = width // num_heads
    longest = 0
    for b in range(kv_cu_seqlens.shape[0] - 1):
        longest = max(longest, kv_cu_seqlens[b + 1] - kv_cu_seqlens[b])
    most = (longest + WIDTH - 1) // WIDTH * WIDTH
    # Rows beyond a sequence's are read where a tile is not full; what comes of them is not.
    queries = np.zeros(ROWS * head, np.float32)
    keys = np.zeros(most * head, np.float32)
    keys_by_column = np.empty(head * most, np.float32)
    values = np.empty(most * head, np.float32)
    weights = np.empty(ROWS * most, np.float32)
    sums = np.empty(ROWS * head, np.float32)
    shares = np.empty(ROWS, np.float32)
    factor = np.float32(_LOG2_E / np.sqrt(head))
    one = np.float32(1)
    for b in range(kv_cu_seqlens.shape[0] - 1):
        begin, end = q_cu_seqlens[b], q_cu_seqlens[b + 1]
        kv_begin = kv_cu_seqlens[b]
        length = kv_cu_seqlens[b + 1] - kv_begin
        columns = (length + WIDTH - 1) // WIDTH * WIDTH
        for h in range(num_heads):
            k_start = k_column + h * head
            _take(kv_product, kv_affine, kv_offset, kv_bias, kv_begin, length, k_start, head, one, keys)
            _take(
                kv_product,
                kv_affine,
                kv_offset,
                kv_bias,
                kv_begin,
                length,
                k_start + width,
                head,
                one,
                values,
            )
            for j in range(0, columns, WIDTH):
                for d in range(0, head, WIDTH):
                    transpose_16(keys, j * head + d, head, keys_by_column, d * columns + j, columns)
            for first in range(begin, end, ROWS):
                count = min(ROWS, end - first)
                _take(q_product, q_affine, q_offset, q_bias, first, count, h * head, head, factor, queries)
                _multiply(queries, head, keys_by_column, columns, columns, weights, columns, head)
                for i in range(count):
                    shares[i] = _softmax_row(weights[i * columns : i * columns + length])
                _multiply(weights, columns, values, head, head, sums, head, length)
                for i in range(count):
                    for d in range(head):
                        attended[first + i, h * head + d] = sums[i * head + d] * shares[i]
        for i in range(begin, end):
            quantize_row(attended[i], codes[i], affine[i])
