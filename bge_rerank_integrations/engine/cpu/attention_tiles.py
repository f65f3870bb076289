"""Attention of one head on register tiles, for kernels that numba compiles."""

from __future__ import annotations

import numpy as np

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
def query_factor(head):
    """Return the factor of the queries of a head, with which `attend_tile` computes softmax attention."""
    return np.float32(_LOG2_E / np.sqrt(head))


@inlined
def make_buffers(cu_seqlens, head):
    """Return the arrays that attention needs for one head of the longest sequence.

    Returns:
        (queries, keys, values), flat arrays of rows, and (keys_by_column, weights, sums, shares), which
        belong to `transpose_keys` and `attend_tile`.
    """
    longest = 0
    for b in range(cu_seqlens.shape[0] - 1):
        longest = max(longest, cu_seqlens[b + 1] - cu_seqlens[b])
    most = (longest + WIDTH - 1) // WIDTH * WIDTH
    # A tile that is not full also reads rows after the last one of a sequence. Their results are not used.
    queries = np.zeros(ROWS * head, np.float32)
    keys = np.zeros(most * head, np.float32)
    values = np.empty(most * head, np.float32)
    # Stored in panels of PANEL columns, so that a tile reads memory that lies close together.
    keys_by_column = np.empty(head * ((most + PANEL - 1) // PANEL * PANEL), np.float32)
    weights = np.empty(ROWS * most, np.float32)
    sums = np.empty(ROWS * head, np.float32)
    shares = np.empty(ROWS, np.float32)
    return queries, keys, values, keys_by_column, weights, sums, shares


@inlined
def transpose_keys(keys, length, head, keys_by_column):
    """Write the transpose of the keys of one head of a sequence, in panels."""
    for j in range(0, (length + WIDTH - 1) // WIDTH * WIDTH, WIDTH):
        start = j // PANEL * PANEL * head + j % PANEL
        for d in range(0, head, WIDTH):
            transpose_16(keys, j * head + d, head, keys_by_column, start + d * PANEL, PANEL)


@inlined
def attend_tile(
    queries, count, keys_by_column, values, length, head, weights, sums, shares, attended, first, column
):
    """Attend from `count` queries, at most ROWS, to the keys and values of one head of a sequence.

    The results go into `attended`, from the row `first` and the column `column` on.
    """
    columns = (length + WIDTH - 1) // WIDTH * WIDTH
    _multiply(queries, head, keys_by_column, PANEL, PANEL * head, columns, weights, columns, head)
    for i in range(count):
        weights[i * columns + length : (i + 1) * columns] = _NO_TOKEN
        shares[i] = np.float32(1) / powers_of_2(weights, i * columns, columns)
    _multiply(weights, columns, values, head, PANEL, head, sums, head, length)
    for i in range(count):
        for d in range(head):
            attended[first + i, column + d] = sums[i * head + d] * shares[i]


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
