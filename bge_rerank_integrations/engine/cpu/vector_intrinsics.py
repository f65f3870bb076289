"""Operations on vector registers, for kernels that numba compiles.

LLVM's vectorizer does not keep a block of a matrix product in registers. These functions therefore emit LLVM
instructions on vectors of 16 floats: one register of AVX-512, or two of AVX2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bge_rerank_integrations.engine.cpu.compiler import compiles_for

ROWS = 6
"""Rows of a tile."""
WIDTH = 16
"""Number of floats in a vector."""
PANEL = 4 * WIDTH if compiles_for("avx512f") else WIDTH
"""Columns of a tile. Its sums take 24 of 32 registers of AVX-512, or 12 of 16 registers of AVX2."""
STEP = 2 * WIDTH
"""Number of floats of a row that the softmax computes at a time."""

LONG = ir.IntType(64)
"""Type of an index."""
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
"""Type of a vector of floats."""
INTS = ir.VectorType(ir.IntType(32), WIDTH)
"""Type of a vector of integers, each as wide as a float."""

FUSE = ("contract",)
"""Flags of an operation on floats: a product and a sum may become one instruction.

Without any flag, numba would set the flag `fast`, which permits LLVM to drop NaN and to cancel sums.
"""

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
# Coefficients of the polynomial with the smallest relative error for 2 to the power of x, from -0.5 to 0.5,
# highest degree first.
_EXP2 = (9.57053155e-3, 5.59186637e-2, 2.40247354e-1, 6.93121672e-1, 9.99999285e-1)
# A float whose last bit is worth 1, plus the exponent that stands for 2 to the power of 0.
_ROUNDING = 1.5 * 2**23 + 127
# The least exponent for which no result of the polynomial is a denormal float.
_LEAST = -125


@intrinsic
def as_float(typing_context, bits):
    """Read the bits of an int32 as a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def widest_vectors(typing_context):
    """Allow LLVM to use the widest vectors in the function that calls this first.

    On processors with AVX-512, LLVM prefers vectors of half the width, since the widest may lower the clock
    frequency. These functions run between oneDNN's products, which use the widest vectors in any case.
    """

    def generate(context, builder, signature, arguments):
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # bypass llvmlite's list of allowed names
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def _keep(builder: Any, total: Any, after: Any, column: int) -> Any:
    return total


def make_multiply(
    num_vectors: int,
    accumulate: Callable[[Any, Any, Any, Any], Any],
    finish: Callable[[Any, Any, Any, int], Any] = _keep,
) -> Any:
    """Return a function that computes c = a b for ROWS rows and `num_vectors` vectors of columns.

    For each matrix, its arguments are a flat float32 array, the index of the first element of the matrix in
    it, and the distance between two rows. The last argument is the depth, at least 1.

    Args:
        num_vectors: Number of vectors of columns.
        accumulate: Emits the sum of a vector and the product of two others. Its arguments are the builder,
            the sum so far, an element of a row of a in every place, and a vector of a row of b.
        finish: Emits what to store for a sum. Its arguments are the builder, the sum, the address of the row
            of b after the last one, and the number of the vector. By default, it is the sum.
    """

    @intrinsic
    def multiply(typing_context, a, a_start, a_step, b, b_start, b_step, c, c_start, c_step, depth):
        index = types.intp
        signature = types.void(a, index, index, b, index, index, c, index, index, index)

        def generate(context, builder, signature, arguments):
            a, b, c = (address_of(context, builder, signature, arguments, place) for place in (0, 3, 6))
            a_step, b_step, c_step, depth = (arguments[position] for position in (2, 5, 8, 9))
            a_rows = [builder.gep(a, [builder.mul(a_step, LONG(row))]) for row in range(ROWS)]
            before = builder.block
            loop, after = builder.append_basic_block("depth"), builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(LONG)
            k.add_incoming(LONG(0), before)
            sums = [[builder.phi(VECTOR) for _ in range(num_vectors)] for _ in range(ROWS)]
            b_row = builder.gep(b, [builder.mul(k, b_step)])
            vectors = [load_vector(builder, b_row, column) for column in range(num_vectors)]
            results = []
            for a_row, row_sums in zip(a_rows, sums, strict=True):
                factor = _spread(builder, builder.load(builder.gep(a_row, [k])))
                results.append(
                    [accumulate(builder, s, factor, v) for s, v in zip(row_sums, vectors, strict=True)]
                )
            for row_sums, row_results in zip(sums, results, strict=True):
                for phi, result in zip(row_sums, row_results, strict=True):
                    phi.add_incoming(_all(0), before)
                    phi.add_incoming(result, loop)
            next_k = builder.add(k, LONG(1))
            k.add_incoming(next_k, loop)
            builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, after)

            builder.position_at_end(after)
            b_after = builder.gep(b, [builder.mul(depth, b_step)])
            for row, row_results in enumerate(results):
                c_row = builder.gep(c, [builder.mul(c_step, LONG(row))])
                for column, result in enumerate(row_results):
                    store_vector(builder, finish(builder, result, b_after, column), c_row, column)
            return context.get_dummy_value()

        return signature, generate

    return multiply


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Emit the sum of a vector of floats and the product of two others."""
    return builder.fadd(total, builder.fmul(a, b, flags=FUSE), flags=FUSE)


multiply_panel, multiply_32, multiply_16 = (
    make_multiply(count, multiply_add) for count in (PANEL // WIDTH, 2, 1)
)


def make_powers_of_2(store: Callable[[Any, list[Any], Any, Any], None]) -> Any:
    """Return a function that replaces each x of a row by 2 ** (factor * (x - greatest of the row)).

    Its arguments are a flat float32 array, the index of the first float of the row, the number of floats,
    which is positive, and the factor, from 0 to 1. It returns the sum of the powers. Floats after the row, up
    to a multiple of STEP, are replaced by zero.

    The integer part of an exponent is set in the bits of the float, and a polynomial computes the rest, with
    a relative error of at most 4e-6. Exponents below -125 are raised to -125, where the power is practically
    zero. Smaller powers could be denormal floats, which are slow to multiply.

    Args:
        store: Emits the store of STEP powers. Its arguments are the builder, the vectors of powers, the
            address of the row, and the index of the first power in the row.
    """

    @intrinsic
    def powers_of_2(typing_context, row, start, length, factor):
        signature = types.float32(row, types.intp, types.intp, types.float32)

        def generate(context, builder, signature, arguments):
            row, length = address_of(context, builder, signature, arguments, 0), arguments[2]
            factors = _spread(builder, arguments[3])

            def masks(index: Any) -> list[Any]:
                """Return which floats from an index on are in the row, for each vector of a step."""
                rest = _spread(builder, builder.trunc(builder.sub(length, index), _INT))
                places = [ir.Constant(INTS, list(range(i, i + WIDTH))) for i in range(0, STEP, WIDTH)]
                return [builder.icmp_signed("<", each, rest) for each in places]

            def load(index: Any) -> list[Any]:
                first = builder.gep(row, [index])
                return [load_vector(builder, first, number) for number in range(STEP // WIDTH)]

            def raise_greatest(index: Any, is_last: bool) -> None:
                vectors = load(index)
                if is_last:
                    vectors = _select(builder, masks(index), vectors, first)
                _update(builder, greatest, vectors, partial(_maximum, builder))

            def add_powers(index: Any, is_last: bool) -> None:
                powers = []
                for x in load(index):
                    above = builder.fmul(builder.fsub(x, most, flags=FUSE), factors, flags=FUSE)
                    # In this order, the maximum keeps NaN.
                    powers.append(_exp2(builder, _maximum(builder, _all(_LEAST), above)))
                if is_last:
                    powers = _select(builder, masks(index), powers, _all(0))
                store(builder, powers, row, index)
                _update(builder, sums, powers, add)

            add = partial(builder.fadd, flags=FUSE)
            # Where all floats are minus infinity, the greatest is too, and the powers are NaN.
            first = _spread(builder, builder.load(row))
            greatest = _carried(builder, first)
            _walk(builder, length, raise_greatest)
            most = _spread(builder, _fold(builder, greatest, partial(_maximum, builder)))
            sums = _carried(builder, _all(0))
            _walk(builder, length, add_powers)
            return _fold(builder, sums, add)

        return signature, generate

    return powers_of_2


def _store_powers(builder: Any, powers: list[Any], row: Any, index: Any) -> None:
    for number, vector in enumerate(powers):
        store_vector(builder, vector, builder.gep(row, [index]), number)


powers_of_2 = make_powers_of_2(_store_powers)


@intrinsic
def transpose_16(typing_context, source, source_start, source_step, target, target_start, target_step):
    """Write the transpose of WIDTH x WIDTH floats. The arguments of both matrices are as for products."""
    index = types.intp
    signature = types.void(source, index, index, target, index, index)

    def generate(context, builder, signature, arguments):
        def row(position: int, number: int) -> Any:
            array = context.make_array(signature.args[position])(context, builder, arguments[position])
            start = builder.add(arguments[position + 1], builder.mul(arguments[position + 2], LONG(number)))
            return builder.gep(array.data, [start])

        rows = [load_vector(builder, row(0, number), 0) for number in range(WIDTH)]
        step = WIDTH // 2
        while step:
            # Two rows at a distance of `step` exchange their off-diagonal blocks of `step` columns.
            lower = [WIDTH + i - step if i & step else i for i in range(WIDTH)]
            upper = [WIDTH + i if i & step else i + step for i in range(WIDTH)]
            for first in (number for number in range(WIDTH) if not number & step):
                pair = rows[first], rows[first + step]
                rows[first], rows[first + step] = (
                    builder.shuffle_vector(*pair, ir.Constant(INTS, mask)) for mask in (lower, upper)
                )
            step //= 2
        for number, vector in enumerate(rows):
            store_vector(builder, vector, row(3, number), 0)
        return context.get_dummy_value()

    return signature, generate


def _walk(builder: Any, length: Any, emit: Callable[[Any, bool], None]) -> None:
    """Emit a loop over the steps of a row.

    `emit` receives the index of the first float of a step, and whether the step is the last one, which may
    contain floats after the row.
    """
    full = builder.and_(length, LONG(-STEP))
    with cgutils.for_range_slice(builder, LONG(0), full, LONG(STEP), intp=LONG) as (index, _):
        emit(index, False)
    with builder.if_then(builder.icmp_signed("<", full, length)):
        emit(full, True)


def _carried(builder: Any, value: Any) -> list[Any]:
    """Return variables with an initial value, one for each vector of a step. LLVM keeps them in registers."""
    variables = [cgutils.alloca_once(builder, VECTOR) for _ in range(STEP // WIDTH)]
    for variable in variables:
        builder.store(value, variable)
    return variables


def _update(
    builder: Any, variables: list[Any], vectors: list[Any], combine: Callable[[Any, Any], Any]
) -> None:
    for variable, vector in zip(variables, vectors, strict=True):
        builder.store(combine(builder.load(variable), vector), variable)


def _select(builder: Any, masks: list[Any], vectors: list[Any], otherwise: Any) -> list[Any]:
    return [builder.select(*each, otherwise) for each in zip(masks, vectors, strict=True)]


def _fold(builder: Any, variables: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce the floats of some vectors to one."""
    vector = reduce(combine, [builder.load(variable) for variable in variables])
    step = WIDTH // 2
    while step:
        mask = [(i + step) % WIDTH for i in range(WIDTH)]
        other = builder.shuffle_vector(vector, vector, ir.Constant(INTS, mask))
        vector = combine(vector, other)
        step //= 2
    return builder.extract_element(vector, _INT(0))


def _exp2(builder: Any, x: Any) -> Any:
    """Return 2 to the power of each x, for x from `_LEAST` to 0."""
    # The sum is so large that it has no fractional bits, and its lowest bits are the exponent of a float.
    shifted = builder.fadd(x, _all(_ROUNDING), flags=FUSE)
    rest = builder.fsub(x, builder.fsub(shifted, _all(_ROUNDING), flags=FUSE), flags=FUSE)
    power = _all(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = builder.fadd(builder.fmul(power, rest, flags=FUSE), _all(coefficient), flags=FUSE)
    bits = builder.shl(builder.bitcast(shifted, INTS), ir.Constant(INTS, [23] * WIDTH))
    return builder.fmul(power, builder.bitcast(bits, VECTOR), flags=FUSE)


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    """Emit the greater of each two floats; the one of b if one of them is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b, flags=FUSE), a, b)


def _all(value: float) -> Any:
    return ir.Constant(VECTOR, [float(np.float32(value))] * WIDTH)


def address_of(context: Any, builder: Any, signature: Any, arguments: Any, place: int) -> Any:
    """Emit the address of the element whose array and index are the arguments at `place` and after it."""
    array = context.make_array(signature.args[place])(context, builder, arguments[place])
    return builder.gep(array.data, [arguments[place + 1]])


def load_vector(builder: Any, row: Any, vector: int) -> Any:
    """Emit a load of one vector of a row, given the address of the row and the number of the vector."""
    address = builder.bitcast(builder.gep(row, [LONG(vector * WIDTH)]), VECTOR.as_pointer())
    return builder.load(address, align=4)


def store_vector(builder: Any, value: Any, row: Any, vector: int) -> None:
    """Emit a store into one vector of a row; see `load_vector`."""
    address = builder.bitcast(builder.gep(row, [LONG(vector * WIDTH)]), VECTOR.as_pointer())
    builder.store(value, address, align=4)


def _spread(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    zeros = ir.Constant(INTS, [0] * WIDTH)
    return builder.shuffle_vector(first, undefined, zeros)
