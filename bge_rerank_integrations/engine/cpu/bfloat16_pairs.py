"""Operations on bfloat16 values, two of which are stored as a pair in the bits of a float.

One instruction of AVX-512 BF16 multiplies 16 pairs with 16 others, and adds both products of each to a float.
Another one rounds 32 floats to bfloat16. Processors without AVX-512 BF16 cannot run these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bge_rerank_integrations.engine.cpu.vector_intrinsics import (
    INTS,
    LONG,
    PANEL,
    STEP,
    VECTOR,
    WIDTH,
    address_of,
    load_vector,
    make_multiply,
    make_powers_of_2,
    store_vector,
)

# They are declared with integers, as in the LLVM of the oldest numba. Newer releases of LLVM accept this too.
_MULTIPLY: Final = "llvm.x86.avx512bf16.dpbf16ps.512"
_ROUND: Final = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
_SHORTS = ir.VectorType(ir.IntType(16), STEP)


def _multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR, INTS, INTS]), _MULTIPLY
    )
    return builder.call(function, [total, builder.bitcast(a, INTS), builder.bitcast(b, INTS)])


# A row of a, and a column of b, has one pair for each step of the depth.
multiply_pairs_panel, multiply_pairs_32, multiply_pairs_16 = (
    make_multiply(count, _multiply_add) for count in (PANEL // WIDTH, 2, 1)
)


@intrinsic
def pack_row(typing_context, source, source_start, target, target_start, count):
    """Round a row of floats to bfloat16, and store each two neighbours as a pair.

    `count`, the number of floats, is a multiple of STEP. The target may be the beginning of the source.
    """
    index = types.intp
    signature = types.void(source, index, target, index, index)

    def generate(context, builder, signature, arguments):
        source_row, target_row = (
            address_of(context, builder, signature, arguments, place) for place in (0, 2)
        )
        with _steps(builder, arguments[4], STEP) as start:
            first = builder.gep(source_row, [start])
            vectors = [load_vector(builder, first, number) for number in range(STEP // WIDTH)]
            _store_pairs(builder, vectors, target_row, start)
        return context.get_dummy_value()

    return signature, generate


def _make_pair_columns(take: Callable[[Any, Any, Any], Any]) -> Any:
    """Return a function that stores the values of each column of two rows as a pair.

    Its arguments are a flat array, the starts of the two rows in it, a flat float32 array for the pairs, the
    start of the pairs in it, and the number of columns, a multiple of WIDTH.

    Args:
        take: Emits a vector of WIDTH bfloat16 values of the first row, and as many of the second one. Its
            arguments are the builder and the addresses of the values in the array.
    """

    @intrinsic
    def pair_columns(typing_context, source, first, second, target, target_start, count):
        index = types.intp
        signature = types.void(source, index, index, target, index, index)

        def generate(context, builder, signature, arguments):
            source, target = (
                context.make_array(signature.args[place])(context, builder, arguments[place]).data
                for place in (0, 3)
            )
            order = [place for column in range(WIDTH) for place in (column, WIDTH + column)]
            mask = ir.Constant(_ints(STEP), order)
            with _steps(builder, arguments[5], WIDTH) as start:
                addresses = [builder.gep(source, [builder.add(row, start)]) for row in arguments[1:3]]
                values = take(builder, *addresses)
                pairs = builder.bitcast(builder.shuffle_vector(values, values, mask), VECTOR)
                store_vector(builder, pairs, builder.gep(target, [builder.add(arguments[4], start)]), 0)
            return context.get_dummy_value()

        return signature, generate

    return pair_columns


def _take_floats(builder: Any, first: Any, second: Any) -> Any:
    return _round(builder, *(load_vector(builder, row, 0) for row in (first, second)))


def _take_bits(builder: Any, first: Any, second: Any) -> Any:
    kind = ir.VectorType(ir.IntType(16), WIDTH).as_pointer()
    rows = [builder.load(builder.bitcast(row, kind), align=2) for row in (first, second)]
    return builder.shuffle_vector(*rows, ir.Constant(_ints(STEP), list(range(STEP))))


def _ints(count: int) -> Any:
    return ir.VectorType(ir.IntType(32), count)


@contextmanager
def _steps(builder: Any, count: Any, step: int) -> Iterator[Any]:
    """Emit a loop, and yield the index of the first float of each step."""
    with cgutils.for_range_slice(builder, LONG(0), count, LONG(step), intp=LONG) as (start, _):
        yield start


def _store_pairs(builder: Any, vectors: list[Any], row: Any, index: Any) -> None:
    """Emit the store of STEP floats as pairs, given the place in the row that the floats would have."""
    pairs = builder.bitcast(_round(builder, *vectors), VECTOR)
    store_vector(builder, pairs, builder.gep(row, [builder.sdiv(index, LONG(2))]), 0)


def _round(builder: Any, low: Any, high: Any) -> Any:
    """Emit the rounding of two vectors to the nearest bfloat16, ties to even. NaN stays NaN.

    Denormal floats become zero.
    """
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_SHORTS, [VECTOR, VECTOR]), _ROUND
    )
    return builder.call(function, [high, low])


pack_columns = _make_pair_columns(_take_floats)
"""Pairs the columns of rows of floats, which it rounds to bfloat16."""
pair_columns = _make_pair_columns(_take_bits)
"""Pairs the columns of rows of bfloat16, whose bits are in a uint16 array."""

# The powers take the beginning of the row, as pairs.
packed_powers_of_2 = make_powers_of_2(_store_pairs)
