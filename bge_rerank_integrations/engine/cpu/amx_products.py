"""Matrix products of pairs of bfloat16 values on AMX, for kernels that numba compiles.

AMX has eight tile registers of 16 rows of 64 bytes. One instruction multiplies two of them, which hold 16
rows of 16 pairs each, and adds the products to a third one, which holds 16 rows of 16 floats. See the chapter
on AMX in volume 1 of Intel's Software Developer's Manual.

Processors without AMX cannot run these functions. Linux ends a process that uses the tile registers without
having asked for them; see `has_amx`.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bge_rerank_integrations.engine.cpu.vector_intrinsics import LONG, WIDTH, address_of

AMX_ROWS: Final = 16
"""Rows of a tile register. Products have as many rows."""

_NUM_TILES: Final = 8
_PAIRS: Final = 16  # pairs, or floats, in a row of a tile register
_BYTES: Final = 4  # in a pair or a float
# Four tile registers hold sums. Tiles of b take turns in three, so that a load need not wait for a product.
_A: Final = 4
_B: Final = (5, 6, 7)
_SHORT = ir.IntType(8)


def _configuration() -> bytes:
    """Return what `ldtilecfg` reads: all tile registers have their full size."""
    row_bytes, rows = (_PAIRS * _BYTES).to_bytes(2, "little"), bytes([AMX_ROWS])
    parts = bytes([1, *[0] * 15]), row_bytes * _NUM_TILES, bytes(16), rows * _NUM_TILES, bytes(8)
    return b"".join(parts)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    """Call an instruction by the name that LLVM gives it. Python integers are numbers of tile registers."""
    values = [_SHORT(each) if isinstance(each, int) else each for each in arguments]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


@intrinsic
def begin_amx(typing_context):
    """Prepare the tile registers of this thread for products."""

    def generate(context, builder, signature, arguments):
        content = ir.Constant(ir.ArrayType(_SHORT, 64), bytearray(_configuration()))
        address = cgutils.global_constant(builder, "amx_configuration", content)
        _call(builder, "ldtilecfg", builder.bitcast(address, cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def end_amx(typing_context):
    """Leave the tile registers of this thread as they are when a thread starts."""

    def generate(context, builder, signature, arguments):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _make_multiply(num_blocks: int) -> Any:
    """Return a function that computes c = a b for AMX_ROWS rows and `num_blocks` blocks of WIDTH columns.

    Its arguments are those of the functions that `make_multiply` returns. The depth is a multiple of 16.
    """

    @intrinsic
    def multiply(typing_context, a, a_start, a_step, b, b_start, b_step, c, c_start, c_step, depth):
        index = types.intp
        signature = types.void(a, index, index, b, index, index, c, index, index, index)

        def generate(context, builder, signature, arguments):
            def bytes_of(position: int) -> Any:
                return builder.mul(arguments[position], LONG(_BYTES))

            def move(instruction: str, tile: int, start: Any, offset: Any, step: Any) -> None:
                address = builder.bitcast(builder.gep(start, [offset]), cgutils.voidptr_t)
                _call(builder, instruction, tile, address, step)

            a, b, c = (address_of(context, builder, signature, arguments, place) for place in (0, 3, 6))
            a_bytes, b_bytes, c_bytes = (bytes_of(position) for position in (2, 5, 8))
            for block in range(num_blocks):
                _call(builder, "tilezero", block)
            with cgutils.for_range(builder, builder.sdiv(arguments[9], LONG(_PAIRS)), intp=LONG) as loop:
                k = builder.mul(loop.index, LONG(_PAIRS))
                b_row = builder.gep(b, [builder.mul(k, arguments[5])])
                move("tileloadd64", _A, a, k, a_bytes)
                for block in range(num_blocks):
                    tile = _B[block % len(_B)]
                    move("tileloadd64", tile, b_row, LONG(block * WIDTH), b_bytes)
                    _call(builder, "tdpbf16ps", block, _A, tile)
            for block in range(num_blocks):
                move("tilestored64", block, c, LONG(block * WIDTH), c_bytes)
            return context.get_dummy_value()

        return signature, generate

    return multiply


multiply_on_amx_64, multiply_on_amx_32, multiply_on_amx_16 = (_make_multiply(count) for count in (4, 2, 1))
