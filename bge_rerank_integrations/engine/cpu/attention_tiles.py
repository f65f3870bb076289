"""Attention of one head on register tiles, for kernels that numba compiles.

A kernel puts the rows of one head of a sequence into the arrays of `make_buffers`. Products of the tiles are
in float32, or in bfloat16 with sums in float32.
"""

from __future__ import annotations

import numpy as np

from bge_rerank_integrations.engine.cpu.bfloat16_pairs import (
    multiply_pairs_16,
    multiply_pairs_32,
    multiply_pairs_64,
    pack_row,
)
from bge_rerank_integrations.engine.cpu.compiler import inlined
from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    NOTHING,
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
_NO_TOKEN = np.float32(NOTHING)


@inlined
def make_buffers(cu_seqlens, head):
    """Return the arrays that attention needs for one head of the longest sequence.

    Returns:
        (queries, keys, values), flat arrays of rows, which a kernel fills, and (columns, pairs, weights,
        sums, shares): the transposed keys, the values in pairs of one row and the next, and arrays that
        `attend_tile` uses. The result of query i of a tile is row i of `sums` times `shares[i]`.
    """
    longest = 0
    for b in range(cu_seqlens.shape[0] - 1):
        longest = max(longest, cu_seqlens[b + 1] - cu_seqlens[b])
    most = (longest + WIDTH - 1) // WIDTH * WIDTH
    # A tile that is not full also reads rows after the last one of a sequence. Their results are not used.
    queries = np.zeros(ROWS * head, np.float32)
    keys = np.zeros(most * head, np.float32)
    values = np.empty((most + 1) * head, np.float32)
    # In panels of PANEL columns, so that a tile reads memory that lies close together.
    columns = np.empty(head * ((most + PANEL - 1) // PANEL * PANEL), np.float32)
    pairs = np.empty((most + 1) // 2 * head, np.float32)
    weights = np.empty(ROWS * most, np.float32)
    sums = np.empty(ROWS * head, np.float32)
    shares = np.empty(ROWS, np.float32)
    return queries, keys, values, columns, pairs, weights, sums, shares


@inlined
def transpose_keys(buffers, length, width):
    """Write the transpose of the keys of one head of a sequence, `width` floats or pairs each, in panels."""
    _, keys, _, columns, _, _, _, _ = buffers
    for j in range(0, (length + WIDTH - 1) // WIDTH * WIDTH, WIDTH):
        start = j // PANEL * PANEL * width + j % PANEL
        for d in range(0, width, WIDTH):
            transpose_16(keys, j * width + d, width, columns, start + d * PANEL, PANEL)


@inlined
def attend_tile(buffers, count, length, head):
    """Attend from `count` queries, at most ROWS, to the keys and values of one head of a sequence."""
    queries, _, values, columns, _, weights, sums, shares = buffers
    num_columns = (length + WIDTH - 1) // WIDTH * WIDTH
    factor = _score_factor(head)
    _multiply(queries, head, columns, PANEL, PANEL * head, num_columns, weights, num_columns, head)
    for i in range(count):
        shares[i] = _softmax(weights, i * num_columns, length, num_columns, factor)
    _multiply(weights, num_columns, values, head, PANEL, head, sums, head, length)


@inlined
def attend_tile_in_pairs(buffers, count, length, head):
    """Do the same as `attend_tile` with products in bfloat16.

    The head is a multiple of 2 * WIDTH. The queries and the transposed keys are pairs of neighbours in a row.
    """
    queries, _, _, columns, pairs, weights, sums, shares = buffers
    num_columns = (length + WIDTH - 1) // WIDTH * WIDTH
    depth = head // 2
    factor = _score_factor(head)
    _multiply_pairs(queries, depth, columns, PANEL, PANEL * depth, num_columns, weights, num_columns, depth)
    for i in range(count):
        start = i * num_columns
        shares[i] = _softmax(weights, start, length, num_columns, factor)
        pack_row(weights, start, weights, start, num_columns)
    _multiply_pairs(weights, num_columns, pairs, head, PANEL, head, sums, head, (length + 1) // 2)


@inlined
def store_results(buffers, count, head, attended, first, column):
    """Write the results of a tile into `attended` [Tq, width], from row `first` and `column` on."""
    _, _, _, _, _, _, sums, shares = buffers
    for i in range(count):
        for d in range(head):
            attended[first + i, column + d] = sums[i * head + d] * shares[i]


@inlined
def _score_factor(head):
    """Return the factor of scores that makes powers of 2 the weights of softmax attention."""
    return np.float32(_LOG2_E / np.sqrt(head))


@inlined
def _softmax(weights, start, length, num_columns, factor):
    """Replace scores by weights that are not normalized yet, and return the factor that normalizes them."""
    weights[start + length : start + num_columns] = _NO_TOKEN
    return np.float32(1) / powers_of_2(weights, start, num_columns, factor)


@inlined
def _multiply(a, a_step, b, b_step, panel_step, columns, c, c_step, depth):
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


@inlined
def _multiply_pairs(a, a_step, b, b_step, panel_step, columns, c, c_step, depth):
    """Do the same as `_multiply` with pairs of bfloat16 in a and b. `depth` counts pairs."""
    j, panel = 0, 0
    while columns - j >= PANEL:
        multiply_pairs_64(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
        j += PANEL
        panel += panel_step
    if columns - j >= 2 * WIDTH:
        multiply_pairs_32(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
        j += 2 * WIDTH
        panel += 2 * WIDTH
    if columns - j >= WIDTH:
        multiply_pairs_16(a, 0, a_step, b, panel, b_step, c, j, c_step, depth)
