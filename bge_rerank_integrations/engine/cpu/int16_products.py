"""Matrix products of uint8 codes and int8 weights on CPUs with AVX2, for kernels that numba compiles.

An instruction of AVX2 multiplies 16 int16 values with 16 others, and adds each two neighbouring products as
an int32. These sums never overflow. Another instruction multiplies 32 uint8 values with 32 int8 values, but
it adds each two neighbouring products as an int16, and cuts off large sums.

Processors with VNNI have better instructions, which oneDNN uses.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from bge_rerank_integrations.engine.cpu.compiler import compiled
from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    INTS,
    ROWS,
    VECTOR,
    WIDTH,
    load_vector,
    make_multiply,
)

COLUMNS: Final = WIDTH
"""Columns of a panel of the weight."""

_MULTIPLY: Final = "llvm.x86.avx2.pmadd.wd"
_HALF: Final = WIDTH // 2  # int32 values in a register of AVX2
_SUMS = ir.VectorType(ir.IntType(32), _HALF)
_FACTORS = ir.VectorType(ir.IntType(16), WIDTH)
# Codes of a block of rows, as int16, that stay in the cache of a core from one panel to the next.
_BLOCK: Final = 128 * 1024


def _multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Add products of int16 pairs to int32 sums. The bits of all of them are stored in floats."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_SUMS, [_FACTORS, _FACTORS]), _MULTIPLY
    )
    halves = []
    for first in (0, _HALF):
        mask = ir.Constant(_SUMS, list(range(first, first + _HALF)))
        sums, *factors = (
            builder.shuffle_vector(builder.bitcast(each, INTS), ir.Constant(INTS, ir.Undefined), mask)
            for each in (total, a, b)
        )
        products = builder.call(function, [builder.bitcast(each, _FACTORS) for each in factors])
        halves.append(builder.add(sums, products))
    together = builder.shuffle_vector(*halves, ir.Constant(INTS, list(range(WIDTH))))
    return builder.bitcast(together, VECTOR)


def _scale(builder: Any, total: Any, after: Any, column: int) -> Any:
    """Convert int32 sums to float, and multiply them with the factors that follow a panel."""
    sums = builder.sitofp(builder.bitcast(total, INTS), VECTOR)
    return builder.fmul(sums, load_vector(builder, after, column))


_multiply_tile = make_multiply(1, _multiply_add, _scale)


def pack_panels(weight: np.ndarray[Any, np.dtype[np.int8]]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Lay out a weight for `multiply_panels`.

    Args:
        weight: int8 [out, in].

    Returns:
        int8 [panels, pairs * COLUMNS * 2]. Each panel has COLUMNS output channels. For each two neighbouring
        inputs it has one pair per channel. Missing channels and a missing last input are zero.
    """
    out, width = weight.shape
    whole = np.pad(weight, ((0, -out % COLUMNS), (0, width % 2)))
    panels = whole.reshape(-1, COLUMNS, whole.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(panels).reshape(len(panels), -1)


@compiled("void(u1[:,::1], i1[:,::1], f4[::1], i8, i8, f4[:,::1])")
def multiply_panels(codes, panels, scale, first, end, product):
    """Multiply codes with some of the panels of a weight.

    Args:
        codes: [rows, in].
        panels: The weight, from `pack_panels`.
        scale: [out], the factor of each channel.
        first: The first panel to multiply with.
        end: The panel after the last one to multiply with.
        product: [rows, out], output. Only the columns of these panels are written.
    """
    num_rows, width = codes.shape
    out = product.shape[1]
    flat_product = product.reshape(product.size)
    pairs = panels.shape[1] // (2 * COLUMNS)
    block = min(max(ROWS, _BLOCK // width // ROWS * ROWS), (num_rows + ROWS - 1) // ROWS * ROWS)
    # A tile that is not full also reads rows after the last one. Their results are not used.
    wide_rows = np.zeros(block * pairs * 2, np.int16)
    rows = wide_rows.view(np.float32)
    # One panel in int16, and then the factors of its channels, which `_scale` reads.
    panel = np.zeros((pairs + 1) * COLUMNS, np.float32)
    wide_panel, factors = panel[: pairs * COLUMNS].view(np.int16), panel[pairs * COLUMNS :]
    tile = np.empty(ROWS * COLUMNS, np.float32)
    for start in range(0, num_rows, block):
        count = min(block, num_rows - start)
        for i in range(count):
            source, target = codes[start + i], wide_rows[i * pairs * 2 : i * pairs * 2 + width]
            for j in range(width):
                target[j] = source[j]
        for number in range(first, end):
            narrow = panels[number]
            for j in range(wide_panel.shape[0]):
                wide_panel[j] = narrow[j]
            column = number * COLUMNS
            num_columns = min(COLUMNS, out - column)
            factors[:num_columns] = scale[column : column + num_columns]
            for i in range(0, count, ROWS):
                place = (start + i) * out + column
                if count - i >= ROWS and num_columns == COLUMNS:
                    _multiply_tile(rows, i * pairs, pairs, panel, 0, COLUMNS, flat_product, place, out, pairs)
                    continue
                _multiply_tile(rows, i * pairs, pairs, panel, 0, COLUMNS, tile, 0, COLUMNS, pairs)
                for row in range(min(ROWS, count - i)):
                    for j in range(num_columns):
                        flat_product[place + row * out + j] = tile[row * COLUMNS + j]
