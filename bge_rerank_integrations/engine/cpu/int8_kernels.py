"""What happens between the int8 products of a layer: one walk over rows that are still in the cache.

Rows are quantized to uint8 each by itself, `value = scale * code + low`, with the scale and the low of the
row in `affine` [rows, 2]. A product of codes with int8 weights is made whole by what follows it here,
`scale * product + low * offset + bias`, where `offset` is the product of a row of ones.

Compiled by numba, and so without a compiler on the machine. Nothing here starts a thread, and no kernel holds
the interpreter's lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from bge_rerank_integrations.engine.cpu.vector_intrinsics import as_float, widest_vectors

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": True,
    "error_model": "numpy",
    "boundscheck": False,
}
# The codes are 0 to 255.
_LEVELS = np.float32(255)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_SIGN = np.int32(31)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@cache
def _sources() -> str:
    """Return a digest of every file that kernels may be made from: those of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiled(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compile for a signature at once, and keep what comes of it where that can be done."""

    def compile_(function: Callable[..., None]) -> Any:
        try:
            # numba looks whether a function's own file has changed, not at those that it takes from others.
            function.__qualname__ = f"{function.__name__}_{_sources()}"
            return njit(signature, cache=True, **_OPTIONS)(function)
        except (OSError, RuntimeError):  # no sources, or no folder that it could be kept in
            return njit(signature, **_OPTIONS)(function)

    return compile_


inlined = njit(inline="always")


@inlined
def _gelu(x):
    """GELU by erf as the quotient of two polynomials (Eigen's, 3e-7 exact), which vectorizes."""
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
    """Return both over integers that order as the floats do: those are vectorized, floats are not."""
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
    """Write the codes of a row, and its scale and least value."""
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
    """Make products whole, apply GELU in place and quantize."""
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
    """Make products whole, add them to x, apply LayerNorm to x in place and quantize it."""
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
