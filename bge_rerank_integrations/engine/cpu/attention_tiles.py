"""Attention of one head on register tiles, for kernels that numba compiles.

A kernel puts the rows of one head of a sequence into `Buffers`. Products of the tiles are
in float32, or in bfloat16 with sums in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bge_rerank_integrations.engine.cpu.bfloat16_pairs import (
    multiply_pairs_16,
    multiply_pairs_32,
    multiply_pairs_64,
    pack_row,
)
from bge_rerank_integrations.engine.cpu.compiler import inlined
from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    PANEL,
    ROWS,
    WIDTH,
    multiply_16,
    multiply_32,
    multiply_64,
    powers_of_2,
    transpose_16,
)

_LOG2_E = 1.4426950408889634


class Buffers(NamedTuple):
    """Flat arrays for one head of a sequence.

    Attributes:
        queries: Rows of ROWS queries, which the kernel fills.
        keys: Rows of keys, which the kernel fills.
        values: Rows of values, which the kernel fills.
        columns: The transposed keys, in panels of PANEL columns, so that a tile reads memory that lies close
            together.
        pairs: The values in pairs of one row and the next, for products in bfloat16. The kernel fills it.
        weights: Scores, and then weights of the softmax that are not normalized, of ROWS queries.
        sums: Weighted sums of values of ROWS queries.
        shares: For each query, the factor that normalizes its sums.
    """

    queries: Any
    keys: Any
    values: Any
    columns: Any
    pairs: Any
    weights: Any
    sums: Any
    shares: Any


@inlined
def make_buffers(cu_seqlens, head):
    """Return `Buffers` for heads of a width, and for the longest of some sequences."""
    longest = 0
    for b in range(cu_seqlens.shape[0] - 1):
        longest = max(longest, cu_seqlens[b + 1] - cu_seqlens[b])
    most = (longest + WIDTH - 1) // WIDTH * WIDTH
    return Buffers(
        # A tile that is not full also reads rows after the last one. Their results are not used.
        np.zeros(ROWS * head, np.float32),
        np.zeros(most * head, np.float32),
        np.empty((most + 1) * head, np.float32),
        np.empty(head * ((most + PANEL - 1) // PANEL * PANEL), np.float32),
        np.empty(most // 2 * head, np.float32),
        np.empty(ROWS * most, np.float32),
        np.empty(ROWS * head, np.float32),
        np.empty(ROWS, np.float32),
    )


@inlined
def transpose_keys(buffers, length, width):
    """Write the transpose of the keys of one head of a sequence, `width` floats or pairs each, in panels."""
    for j in range(0, (length + WIDTH - 1) // WIDTH * WIDTH, WIDTH):
        start = j // PANEL * PANEL * width + j % PANEL
        for d in range(0, width, WIDTH):
            transpose_16(buffers.keys, j * width + d, width, buffers.columns, start + d * PANEL, PANEL)


def _make_product(multiply_64, multiply_32, multiply_16):
    @inlined
    def multiply(a, a_step, b, b_step, panel_step, columns, c, c_step, depth):
        """Compute c = a b for ROWS rows of a and `columns` columns of b, which are a multiple of WIDTH.

        `panel_step` is the distance between two panels of PANEL columns in b.
        """
        j, panel = 0, 0
        while columns - j >= PANEL:
            multiply_64(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
            j += PANEL
            panel += panel_step
        if columns - j >= 2 * WIDTH:
            multiply_32(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
            j += 2 * WIDTH
            panel += 2 * WIDTH
        if columns - j >= WIDTH:
            multiply_16(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)

    return multiply


_multiply = _make_product(multiply_64, multiply_32, multiply_16)
_multiply_pairs = _make_product(multiply_pairs_64, multiply_pairs_32, multiply_pairs_16)


@inlined
def attend_tile(buffers, count, length, head):
    """Attend from `count` queries, at most ROWS, to the keys and values of one head of a sequence.

    The result of query i is row i of `buffers.sums` times `buffers.shares[i]`.
    """
    weights = buffers.weights
    step = (length + WIDTH - 1) // WIDTH * WIDTH
    factor = _score_factor(head)
    _multiply(buffers.queries, head, buffers.columns, PANEL, PANEL * head, step, weights, step, head)
    for i in range(count):
        buffers.shares[i] = np.float32(1) / powers_of_2(weights, i * step, length, factor)
    _multiply(weights, step, buffers.values, head, PANEL, head, buffers.sums, head, length)


@inlined
def attend_tile_in_pairs(buffers, count, length, head):
    """Do the same as `attend_tile` with products in bfloat16.

    The head is a multiple of 2 * WIDTH. The queries and the transposed keys are pairs of neighbours in a row.
    """
    weights = buffers.weights
    step = (length + WIDTH - 1) // WIDTH * WIDTH
    depth = head // 2
    factor = _score_factor(head)
    _multiply_pairs(buffers.queries, depth, buffers.columns, PANEL, PANEL * depth, step, weights, step, depth)
    for i in range(count):
        buffers.shares[i] = np.float32(1) / powers_of_2(weights, i * step, length, factor)
        pack_row(weights, i * step, weights, i * step, step)
    _multiply_pairs(weights, step, buffers.pairs, head, PANEL, head, buffers.sums, head, (length + 1) // 2)


@inlined
def store_results(buffers, count, head, attended, first, column):
    """Write the results of a tile into `attended` [Tq, width], from row `first` and `column` on."""
    for i in range(count):
        for d in range(head):
            attended[first + i, column + d] = buffers.sums[i * head + d] * buffers.shares[i]


@inlined
def _score_factor(head):
    """Return the factor of scores that makes powers of 2 the weights of softmax attention."""
    return np.float32(_LOG2_E / np.sqrt(head))
