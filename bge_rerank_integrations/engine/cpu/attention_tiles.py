"""Attention of one head on register tiles, for kernels that numba compiles.

A kernel puts the rows of one head of a sequence into `Buffers`. Products of the tiles are in float32, or in
bfloat16 with sums in float32. Products in bfloat16 use AMX if the processor has it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bge_rerank_integrations.engine.cpu.amx_products import (
    AMX_ROWS,
    begin_amx,
    end_amx,
    multiply_on_amx_16,
    multiply_on_amx_32,
    multiply_on_amx_64,
)
from bge_rerank_integrations.engine.cpu.bfloat16_pairs import (
    multiply_pairs_16,
    multiply_pairs_32,
    multiply_pairs_panel,
    packed_powers_of_2,
)
from bge_rerank_integrations.engine.cpu.compiler import HAS_AMX, inlined
from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    PANEL,
    ROWS,
    STEP,
    WIDTH,
    multiply_16,
    multiply_32,
    multiply_panel,
    powers_of_2,
    transpose_16,
)

ROWS_IN_PAIRS = AMX_ROWS if HAS_AMX else ROWS
"""Rows of a tile whose products are in bfloat16."""

_LOG2_E = 1.4426950408889634


class Buffers(NamedTuple):
    """Flat arrays for one head of a sequence.

    Attributes:
        queries: Rows of the queries of a tile, which the kernel fills.
        keys: Rows of keys, which the kernel fills.
        values: Rows of values, which the kernel fills.
        columns: The transposed keys, in panels of PANEL columns, so that a tile reads memory that lies close
            together.
        pairs: The values in pairs of one row and the next, for products in bfloat16. The kernel fills it.
        weights: Scores, and then weights of the softmax that are not normalized, of the queries.
        sums: Weighted sums of values of the queries.
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
def make_buffers(cu_seqlens, head_dim, rows):
    """Return `Buffers` for the longest of some sequences, a width of heads, and the rows of a tile."""
    longest = 0
    for b in range(cu_seqlens.shape[0] - 1):
        longest = max(longest, cu_seqlens[b + 1] - cu_seqlens[b])
    most = _round_up(longest, STEP)
    return Buffers(
        # A tile that is not full also reads rows after the last one. Their results are not used.
        np.zeros(rows * head_dim, np.float32),
        np.zeros(most * head_dim, np.float32),
        np.empty((most + 1) * head_dim, np.float32),
        np.empty(head_dim * _round_up(most, PANEL), np.float32),
        np.empty(most // 2 * head_dim, np.float32),
        np.empty(rows * _distance(longest), np.float32),
        np.empty(rows * head_dim, np.float32),
        np.empty(rows, np.float32),
    )


@inlined
def transpose_keys(buffers, length, width):
    """Write the transpose of the keys of one head of a sequence, `width` floats or pairs each, in panels."""
    for j in range(0, length, WIDTH):
        start = j // PANEL * PANEL * width + j % PANEL
        for d in range(0, width, WIDTH):
            transpose_16(buffers.keys, j * width + d, width, buffers.columns, start + d * PANEL, PANEL)


@inlined
def prepare_pairs(buffers, length, head_dim):
    """Complete the keys and values of one head of a sequence, which are pairs, for `attend_tile_in_pairs`."""
    transpose_keys(buffers, length, head_dim // 2)
    if HAS_AMX:
        # The weights of these rows are zero, and zero times what an earlier sequence has left may be NaN.
        buffers.pairs[(length + 1) // 2 * head_dim : _round_up(length, STEP) // 2 * head_dim] = np.float32(0)


def _make_product(multiply_panel, multiply_32, multiply_16):
    @inlined
    def multiply(a, a_step, b, b_step, panel_step, columns, c, c_step, depth):
        """Compute c = a b for all rows of a tile and `columns` columns of b, which are a multiple of WIDTH.

        `panel_step` is the distance between two panels of PANEL columns in b.
        """
        j, panel = 0, 0
        while columns - j >= PANEL:
            multiply_panel(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
            j += PANEL
            panel += panel_step
        if columns - j >= 2 * WIDTH:
            multiply_32(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
            j += 2 * WIDTH
            panel += 2 * WIDTH
        if columns - j >= WIDTH:
            multiply_16(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)

    return multiply


_multiply = _make_product(multiply_panel, multiply_32, multiply_16)
# Only one of the two is compiled, since the processor may lack the instructions of the other.
_multiply_pairs = (
    _make_product(multiply_on_amx_64, multiply_on_amx_32, multiply_on_amx_16)
    if HAS_AMX
    else _make_product(multiply_pairs_panel, multiply_pairs_32, multiply_pairs_16)
)


@inlined
def attend_tile(buffers, count, length, head_dim):
    """Attend from `count` queries, at most ROWS, to the keys and values of one head of a sequence.

    The result of query i is row i of `buffers.sums` times `buffers.shares[i]`.
    """
    weights = buffers.weights
    columns, step = _round_up(length, WIDTH), _distance(length)
    factor = _score_factor(head_dim)
    _multiply(
        buffers.queries, head_dim, buffers.columns, PANEL, PANEL * head_dim, columns, weights, step, head_dim
    )
    for i in range(count):
        buffers.shares[i] = np.float32(1) / powers_of_2(weights, i * step, length, factor)
    _multiply(weights, step, buffers.values, head_dim, PANEL, head_dim, buffers.sums, head_dim, length)


@inlined
def attend_tile_in_pairs(buffers, count, length, head_dim):
    """Do the same as `attend_tile` for at most ROWS_IN_PAIRS queries, with products in bfloat16.

    `head_dim` is a multiple of 2 * WIDTH. The queries are pairs of neighbours in a row. A kernel calls
    `begin_pairs` first, `prepare_pairs` before the first tile of a head, and `end_pairs` at the end.
    """
    weights = buffers.weights
    columns, step, depth = _round_up(length, WIDTH), _distance(length), head_dim // 2
    factor = _score_factor(head_dim)
    _multiply_pairs(
        buffers.queries, depth, buffers.columns, PANEL, PANEL * depth, columns, weights, step, depth
    )
    for i in range(count):
        buffers.shares[i] = np.float32(1) / packed_powers_of_2(weights, i * step, length, factor)
    # AMX multiplies as many pairs of rows as a step of the softmax fills with weights.
    num_pairs = _round_up(length, STEP) // 2 if HAS_AMX else (length + 1) // 2
    _multiply_pairs(
        weights, step, buffers.pairs, head_dim, PANEL, head_dim, buffers.sums, head_dim, num_pairs
    )


@inlined
def begin_pairs():
    """Prepare this thread for `attend_tile_in_pairs`."""
    if HAS_AMX:
        begin_amx()


@inlined
def end_pairs():
    """Undo `begin_pairs`."""
    if HAS_AMX:
        end_amx()


@inlined
def store_results(buffers, count, head_dim, attended, first, column):
    """Write the results of a tile into `attended` [Tq, width], from row `first` and `column` on."""
    for i in range(count):
        for d in range(head_dim):
            attended[first + i, column + d] = buffers.sums[i * head_dim + d] * buffers.shares[i]


@inlined
def _score_factor(head_dim):
    """Return the factor of scores that makes powers of 2 the weights of softmax attention."""
    return np.float32(_LOG2_E / np.sqrt(head_dim))


@inlined
def _round_up(number, multiple):
    return (number + multiple - 1) // multiple * multiple


@inlined
def _distance(length):
    """Return the distance between two rows of weights. The softmax may write past the end of a row."""
    # Rows at a distance of a power of two would compete for the same few places in the cache.
    return _round_up(length, STEP) + WIDTH
