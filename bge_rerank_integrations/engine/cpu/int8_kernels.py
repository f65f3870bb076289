"""Kernels that run between the int8 products of a layer. Each makes one pass over rows that are in the cache.

Each row is quantized to uint8 by itself: `value = scale * code + low`. `affine` [rows, 2] contains the scale
and the low of each row. A matrix product multiplies the codes with an int8 weight. The kernel that follows
the product restores the values as `scale * product + low * offset + bias`, where `offset` [out] is the
product of a row of ones with the weight.
"""

from __future__ import annotations

import numpy as np

from bge_rerank_integrations.engine.cpu.compiler import compiled, inlined
from bge_rerank_integrations.engine.cpu.vector_intrinsics import as_float, widest_vectors

# Codes are integers from 0 to 255.
_LEVELS = np.float32(255)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_SIGN = np.int32(31)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@inlined
def _gelu(x):
    """Compute GELU. erf is a quotient of two polynomials (from Eigen, accurate to 3e-7), which vectorizes."""
    z = x * np.float32(0.7071067811865476)
    z = min(max(z, np.float32(-3.7439211627767994)), np.float32(3.7439211627767994))
    zz = z * z
    p = np.float32(2.2905065861350646e-4)
    p = p * zz + np.float32(3.4082910107109506e-3)
    p = p * zz + np.float32(5.0955695062380861e-2)
    p = p * zz + np.float32(1.8520832239976145e-1)
    p = p * zz + np.float32(1.128379143519084)
    q = np.float32(-1.1791602954361697e-7)
    q = q * zz + np.float32(2.3547966471313185e-5)
    q = q * zz + np.float32(1.0179625278914885e-3)
    q = q * zz + np.float32(1.4070470171167667e-2)
    q = q * zz + np.float32(1.1098505178285362e-1)
    q = q * zz + np.float32(4.9746925110067538e-1)
    q = q * zz + _ONE
    return _HALF * x * (_ONE + z * p / q)


@inlined
def greatest_and_least(row):
    """Return the greatest and least float of a row. Compare them as integers, which LLVM can vectorize."""
    bits = row.view(np.int32)
    least, greatest = _MAGNITUDE, ~_MAGNITUDE
    for j in range(bits.shape[0]):
        key = bits[j] ^ ((bits[j] >> _SIGN) & _MAGNITUDE)
        least = min(least, key)
        greatest = max(greatest, key)
    return (
        as_float(greatest ^ ((greatest >> _SIGN) & _MAGNITUDE)),
        as_float(least ^ ((least >> _SIGN) & _MAGNITUDE)),
    )


@inlined
def quantize_row(row, codes, affine):
    """Quantize a row: write its codes, and its scale and low."""
    greatest, least = greatest_and_least(row)
    spread = greatest - least
    per_level = _LEVELS / spread if spread > 0 else np.float32(0)
    affine[0] = spread / _LEVELS
    affine[1] = least
    for j in range(row.shape[0]):
        codes[j] = np.int32((row[j] - least) * per_level + _HALF)


@compiled("void(f4[:,::1], u1[:,::1], f4[:,::1])")
def quantize(x, codes, affine):
    """Quantize the rows of x."""
    widest_vectors()
    for i in range(x.shape[0]):
        quantize_row(x[i], codes[i], affine[i])


@compiled("void(f4[:,::1], f4[:,::1], f4[::1], f4[::1], u1[:,::1], f4[:,::1])")
def gelu_quantize(product, affine, offset, bias, codes, out_affine):
    """Restore the values of a product, apply GELU in place, and quantize the rows."""
    widest_vectors()
    for i in range(product.shape[0]):
        row = product[i]
        scale, low = affine[i, 0], affine[i, 1]
        for j in range(row.shape[0]):
            row[j] = _gelu(scale * row[j] + (low * offset[j] + bias[j]))
        quantize_row(row, codes[i], out_affine[i])


@compiled(
    "void(f4[:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1], f4[::1], f4[::1], f4, u1[:,::1], f4[:,::1])"
)
def add_norm_quantize(product, affine, offset, bias, x, weight, shift, eps, codes, out_affine):
    """Restore the values of a product, add them to x, normalize x in place, and quantize its rows."""
    widest_vectors()
    width = np.float32(x.shape[1])
    for i in range(x.shape[0]):
        row, added = x[i], product[i]
        scale, low = affine[i, 0], affine[i, 1]
        total = np.float32(0)
        for j in range(row.shape[0]):
            value = row[j] + scale * added[j] + (low * offset[j] + bias[j])
            row[j] = value
            total += value
        mean = total / width
        squares = np.float32(0)
        for j in range(row.shape[0]):
            squares += (row[j] - mean) * (row[j] - mean)
        per_deviation = _ONE / np.sqrt(squares / width + eps)
        for j in range(row.shape[0]):
            row[j] = (row[j] - mean) * per_deviation * weight[j] + shift[j]
        quantize_row(row, codes[i], out_affine[i])
