"""Matrix products in float32 on register tiles, for kernels that numba compiles.

A tile has ROWS rows and PANEL columns. On AVX2, MKL multiplies 2 to 64 rows more slowly, and more rows about
as fast (benchmarks/LOG.md, 40). On AMD's Zen 4, oneDNN multiplies any number of rows more slowly (50).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from bge_rerank_integrations.engine.cpu.compiler import compiled
from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    FUSE,
    PANEL,
    ROWS,
    WIDTH,
    load_vector,
    make_multiply,
    multiply_add,
)

# Floats of a block of rows that stay in the cache of a core from one panel to the next.
_BLOCK: Final = 96 * 1024


def _add_bias(builder: Any, total: Any, after: Any, column: int) -> Any:
    """Add the bias, which follows a panel."""
    return builder.fadd(total, load_vector(builder, after, column), flags=FUSE)


_multiply_tile = make_multiply(PANEL // WIDTH, multiply_add, _add_bias)


def pack_panels(
    weight: np.ndarray[Any, np.dtype[np.float32]], bias: np.ndarray[Any, np.dtype[np.float32]]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Lay out a linear layer for `multiply_panels`.

    Args:
        weight: float32 [out, in].
        bias: float32 [out].

    Returns:
        float32 [panels, (in + 1) * PANEL]. Each panel has PANEL output channels: for each input the
        weight of every channel, and then the bias of every channel. Missing channels are zero.
    """
    out, width = weight.shape
    num_panels = -(-out // PANEL)
    panels = np.zeros((num_panels, width + 1, PANEL), np.float32)
    for number, panel in enumerate(panels):
        channels = slice(number * PANEL, min((number + 1) * PANEL, out))
        num_channels = channels.stop - channels.start
        panel[:width, :num_channels] = weight[channels].T
        panel[width, :num_channels] = bias[channels]
    return panels.reshape(num_panels, -1)


@compiled("void(f4[:,::1], f4[:,::1], i8, i8, f4[:,::1])")
def multiply_panels(x, panels, first, end, product):
    """Multiply rows with some of the panels of a linear layer, and add the bias.

    Args:
        x: [rows, in].
        panels: The layer, from `pack_panels`.
        first: The first panel to multiply with.
        end: The panel after the last one to multiply with.
        product: [rows, out], output. Only the columns of these panels are written.
    """
    num_rows, width = x.shape
    out = product.shape[1]
    flat_x, flat_product = x.reshape(x.size), product.reshape(product.size)
    flat_panels = panels.reshape(panels.size)
    num_whole = num_rows // ROWS * ROWS
    # The rows after the last whole tile, and rows of zeros that fill their tile.
    rest = np.zeros(ROWS * width, np.float32)
    rest[: (num_rows - num_whole) * width] = flat_x[num_whole * width :]
    tile = np.empty(ROWS * PANEL, np.float32)
    block = max(ROWS, _BLOCK // width // ROWS * ROWS)
    for start in range(0, num_rows, block):
        for number in range(first, end):
            panel, column = number * panels.shape[1], number * PANEL
            num_columns = min(PANEL, out - column)
            for i in range(start, min(start + block, num_rows), ROWS):
                place = i * out + column
                if i < num_whole and num_columns == PANEL:
                    _multiply_tile(
                        flat_x, i * width, width, flat_panels, panel, PANEL, flat_product, place, out, width
                    )
                    continue
                source, at = (flat_x, i * width) if i < num_whole else (rest, 0)
                _multiply_tile(source, at, width, flat_panels, panel, PANEL, tile, 0, PANEL, width)
                for row in range(min(ROWS, num_rows - i)):
                    for j in range(num_columns):
                        flat_product[place + row * out + j] = tile[row * PANEL + j]
