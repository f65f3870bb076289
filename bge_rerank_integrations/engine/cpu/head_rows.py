"""Rows of queries, keys and values in memory, for attention kernels that numba compiles."""

from __future__ import annotations

from torch import Tensor

from bge_rerank_integrations.engine.cpu.compiler import inlined


def flatten_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the memory from the first to the last of the rows, and the distance between two of them.

    Args:
        rows: [rows, heads, head_dim], such as a part of the output of one projection.

    Returns:
        A flat tensor that shares the memory of the rows, or of a contiguous copy if the heads of a row do not
        lie next to each other, and the number of values from the start of a row to the start of the next.
    """
    num_rows, num_heads, head_dim = rows.shape
    if rows.stride()[1:] != (head_dim, 1):
        rows = rows.contiguous()
    step = rows.stride(0)
    return rows.as_strided(((num_rows - 1) * step + num_heads * head_dim,), (1,)), step


@inlined
def take_rows(source, step, first, count, column, head_dim, rows):
    """Copy `count` rows of one head to the flat array `rows`, which has the type of `source`."""
    for i in range(count):
        start = (first + i) * step + column
        part, target = source[start : start + head_dim], rows[i * head_dim : (i + 1) * head_dim]
        for d in range(head_dim):
            target[d] = part[d]
