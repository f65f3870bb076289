"""Operations on vector registers, for kernels that numba compiles.

LLVM's vectorizer does not keep a block of a matrix product in registers. These functions therefore emit LLVM
instructions on vectors of 16 floats: one register of AVX-512, or two of AVX2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROWS = 6
"""Rows of a tile. A tile of 6 rows and 64 columns keeps its sums in 24 of 32 registers."""
WIDTH = 16
"""Number of floats in a vector."""
PANEL = 4 * WIDTH
"""Columns of a tile."""
NOTHING = -3e38
"""Stands for minus infinity, which code compiled with fast-math must not contain."""

LONG = ir.IntType(64)
"""Type of an index."""
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
"""Type of a vector of floats."""
INTS = ir.VectorType(ir.IntType(32), WIDTH)
"""Type of a vector of integers, each as wide as a float."""

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
# Coefficients of a polynomial for 2 to the power of x, from -0.5 to 0.5, highest degree first.
_EXP2 = (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
_FUSE = ("contract",)  # a product and a sum may become one instruction


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


def make_multiply(num_vectors: int, multiply_add: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """Return a function that computes c = a b for ROWS rows and `num_vectors` vectors of columns.

    For each matrix, its arguments are a flat float32 array, the index of the first element of the matrix in
    it, and the distance between two rows. The last argument is the depth, at least 1.

    Args:
        num_vectors: Number of vectors of columns.
        multiply_add: Emits the sum of a vector and the product of two others. Its arguments are the builder,
            the sum so far, an element of a row of a in every place, and a vector of a row of b.
    """

    @intrinsic
    def multiply(typing_context, a, a_start, a_step, b, b_start, b_step, c, c_start, c_step, depth):
        index = types.intp
        signature = types.void(a, index, index, b, index, index, c, index, index, index)

        def generate(context, builder, signature, arguments):
            def pointer(position: int) -> Any:
                array = context.make_array(signature.args[position])(context, builder, arguments[position])
                return builder.gep(array.data, [arguments[position + 1]])

            a, b, c = (pointer(position) for position in (0, 3, 6))
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
                    [multiply_add(builder, s, factor, v) for s, v in zip(row_sums, vectors, strict=True)]
                )
            for row_sums, row_results in zip(sums, results, strict=True):
                for phi, result in zip(row_sums, row_results, strict=True):
                    phi.add_incoming(_all(0), before)
                    phi.add_incoming(result, loop)
            next_k = builder.add(k, LONG(1))
            k.add_incoming(next_k, loop)
            builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, after)

            builder.position_at_end(after)
            for row, row_results in enumerate(results):
                c_row = builder.gep(c, [builder.mul(c_step, LONG(row))])
                for column, result in enumerate(row_results):
                    store_vector(builder, result, c_row, column)
            return context.get_dummy_value()

        return signature, generate

    return multiply


def _multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=_FUSE), flags=_FUSE)


multiply_64, multiply_32, multiply_16 = (make_multiply(count, _multiply_add) for count in (4, 2, 1))


@intrinsic
def powers_of_2(typing_context, row, start, length, factor):
    """Replace each x of a row by 2 ** (factor * (x - greatest of the row)), and return the sum.

    The integer part of an exponent is set in the bits of the float, and a polynomial computes the rest, with
    a relative error of at most 4e-6. Exponents below -126 are raised to -126, where the power is practically
    zero. `length`, the number of floats, is positive, and `factor` is from 0 to 1. Floats after the row, up
    to a multiple of WIDTH, become zero.
    """
    signature = types.float32(row, types.intp, types.intp, types.float32)

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        row, length = builder.gep(array.data, [arguments[1]]), arguments[2]

        def is_in_row(index: Any) -> Any:
            rest = _spread(builder, builder.trunc(builder.sub(length, index), _INT))
            return builder.icmp_signed("<", ir.Constant(INTS, list(range(WIDTH))), rest)

        def greater(carried: Any, index: Any, address: Any) -> Any:
            # Do not store a value that stands for no token: a load of a vector has to wait for stores of
            # single floats to the same place.
            x = builder.select(is_in_row(index), builder.load(address, align=4), _all(NOTHING))
            return _maximum(builder, carried, x)

        def add_power(carried: Any, index: Any, address: Any) -> Any:
            above = builder.fmul(builder.fsub(builder.load(address, align=4), greatest), factors)
            # In this order, the maximum keeps NaN.
            power = _exp2(builder, _maximum(builder, _all(-126), above))
            power = builder.select(is_in_row(index), power, _all(0))
            builder.store(power, address, align=4)
            return builder.fadd(carried, power)

        factors = _spread(builder, arguments[3])
        found = _walk(builder, row, length, NOTHING, greater)
        greatest = _spread(builder, _fold(builder, found, partial(_maximum, builder)))
        return _fold(builder, _walk(builder, row, length, 0, add_power), builder.fadd)

    return signature, generate


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


def _walk(builder: Any, row: Any, count: Any, first: float, step: Callable[[Any, Any, Any], Any]) -> Any:
    """Call `step` with a carried vector, and the index and address of each vector of a row.

    Returns:
        The result of the last call. The result of each call is the carried vector of the next one.
    """
    before = builder.block
    loop, after = builder.append_basic_block("walk"), builder.append_basic_block("walked")
    builder.branch(loop)
    builder.position_at_end(loop)
    index, carried = builder.phi(LONG), builder.phi(VECTOR)
    result = step(carried, index, builder.bitcast(builder.gep(row, [index]), VECTOR.as_pointer()))
    following = builder.add(index, LONG(WIDTH))
    for phi, initial, next_ in ((index, LONG(0), following), (carried, _all(first), result)):
        phi.add_incoming(initial, before)
        phi.add_incoming(next_, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return result


def _fold(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce the floats of a vector to one."""
    step = WIDTH // 2
    while step:
        mask = [(i + step) % WIDTH for i in range(WIDTH)]
        other = builder.shuffle_vector(vector, vector, ir.Constant(INTS, mask))
        vector = combine(vector, other)
        step //= 2
    return builder.extract_element(vector, _INT(0))


def _exp2(builder: Any, x: Any) -> Any:
    """Return 2 to the power of each x, for x from -126 to 0."""
    whole = builder.fptosi(builder.fsub(x, _all(0.5)), INTS)
    rest = builder.fsub(x, builder.sitofp(whole, VECTOR))
    power = _all(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = builder.fadd(builder.fmul(power, rest, flags=_FUSE), _all(coefficient), flags=_FUSE)
    exponent = builder.add(whole, ir.Constant(INTS, [127] * WIDTH))
    bits = builder.shl(exponent, ir.Constant(INTS, [23] * WIDTH))
    return builder.fmul(power, builder.bitcast(bits, VECTOR))


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _all(value: float) -> Any:
    return ir.Constant(VECTOR, [float(np.float32(value))] * WIDTH)


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
