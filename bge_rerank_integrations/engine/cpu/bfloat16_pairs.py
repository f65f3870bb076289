"""Matrix products of bfloat16 values, two of which are stored as a pair in the bits of a float.

One instruction of AVX-512 BF16 multiplies 16 pairs with 16 others, and adds both products of each to a float.
Processors without it cannot run the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    INTS,
    LONG,
    VECTOR,
    WIDTH,
    load_vector,
    make_multiply,
    store_vector,
)

# It is declared with integers, as in the LLVM of the oldest numba. Newer releases of LLVM accept this too.
_INSTRUCTION: Final = "llvm.x86.avx512bf16.dpbf16ps.512"
_SHORTS = ir.VectorType(ir.IntType(16), WIDTH)


def _multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR, INTS, INTS]), _INSTRUCTION
    )
    return builder.call(function, [total, builder.bitcast(a, INTS), builder.bitcast(b, INTS)])


# A row of a, and a column of b, has one pair for each step of the depth.
multiply_pairs_64, multiply_pairs_32, multiply_pairs_16 = (
    make_multiply(count, _multiply_add) for count in (4, 2, 1)
)


@intrinsic
def pack_row(typing_context, source, source_start, target, target_start, count):
    """Round a row of floats to bfloat16, and store each two neighbours as a pair.

    `count`, the number of floats, is a multiple of WIDTH. The target may be the beginning of the source.
    """
    index = types.intp
    signature = types.void(source, index, target, index, index)

    def generate(context, builder, signature, arguments):
        source, target = (
            context.make_array(signature.args[place])(context, builder, arguments[place]).data
            for place in (0, 2)
        )

        def pack(start: Any) -> None:
            rounded = _load_rounded(builder, source, builder.add(arguments[1], start))
            place = builder.add(arguments[3], builder.sdiv(start, LONG(2)))
            address = builder.bitcast(builder.gep(target, [place]), _SHORTS.as_pointer())
            builder.store(rounded, address, align=4)

        _for_each_vector(builder, arguments[4], pack)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def pack_columns(typing_context, source, first, second, target, target_start, count):
    """Round two rows of floats to bfloat16, and store the two values of each column as a pair.

    `first` and `second` are the starts of the rows in the flat array `source`. `count`, the number of
    columns, is a multiple of WIDTH.
    """
    index = types.intp
    signature = types.void(source, index, index, target, index, index)

    def generate(context, builder, signature, arguments):
        source, target = (
            context.make_array(signature.args[place])(context, builder, arguments[place]).data
            for place in (0, 3)
        )

        def pack(start: Any) -> None:
            low, high = (
                builder.zext(_load_rounded(builder, source, builder.add(row, start)), INTS)
                for row in (arguments[1], arguments[2])
            )
            pairs = builder.bitcast(builder.or_(low, builder.shl(high, _all(16))), VECTOR)
            store_vector(builder, pairs, builder.gep(target, [builder.add(arguments[4], start)]), 0)

        _for_each_vector(builder, arguments[5], pack)
        return context.get_dummy_value()

    return signature, generate


def _for_each_vector(builder: Any, count: Any, emit: Callable[[Any], None]) -> None:
    """Emit a loop over the starts of the vectors of `count` floats."""
    with cgutils.for_range(builder, builder.sdiv(count, LONG(WIDTH)), intp=LONG) as loop:
        emit(builder.mul(loop.index, LONG(WIDTH)))


def _load_rounded(builder: Any, array: Any, start: Any) -> Any:
    """Load a vector of floats, round it to the nearest bfloat16, ties to even, and return the bits.

    NaN stays NaN if it is a result of arithmetic, which sets the first bit of the mantissa only.
    """
    bits = builder.bitcast(load_vector(builder, builder.gep(array, [start]), 0), INTS)
    last = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    rounded = builder.add(builder.add(bits, _all(0x7FFF)), last)
    return builder.trunc(builder.lshr(rounded, _all(16)), _SHORTS)


def _all(value: int) -> Any:
    return ir.Constant(INTS, [value] * WIDTH)
