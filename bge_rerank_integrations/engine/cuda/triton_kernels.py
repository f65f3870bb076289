"""Fused kernels in Triton. They are imported only if Triton is installed, and tried before they are used.

Each program works on one row, on a part of a row, or on tiles of a product. A new number of rows does not
compile a new kernel: it determines only the grid, or it is an argument that Triton must not specialize on.
The widths are constants of the model. Triton also compiles different kernels for addresses that are multiples
of 16 and for others. Every tensor here starts at the beginning of an allocation, and torch's allocator
returns multiples of 512.
"""

# Without `from __future__ import annotations`, since Triton reads the annotations at run time.
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bge_rerank_integrations.engine.blocks import Norm, Quantized

TRITON = triton.__version__

# Most elements of a row that one program of an elementwise kernel processes.
_MAX_BLOCK = 1024
# The tile of a product that a program computes, and how much of the inner dimension it loads at once. On an
# H200, these were the fastest of a dozen sizes. Four loads fill the shared memory of compute capability 9.0.
_TILE_ROWS, _TILE_COLUMNS, _TILE_INNER = 128, 256, 64
_NUM_STAGES = 4
# Programs that run at the same time work on tiles of this many neighbouring blocks of rows, so that they find
# the weight in the cache.
_GROUP = 8
# A product and a sum become one instruction. Triton 3.10 changes the default.
_OPTIONS = {"enable_fp_fusion": True}


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias and apply the exact GELU."""
    num_rows, width = x.shape
    out = torch.empty_like(x)
    block = min(triton.next_power_of_2(width), _MAX_BLOCK)
    _bias_gelu[(num_rows, triton.cdiv(width, block))](x, bias, out, width, block, **_OPTIONS)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply by a weight [out, in], add a bias, and apply the exact GELU to the float32 sums.

    Devices of compute capability 9.0 or later can load and store whole tiles by themselves, from a descriptor
    of the matrix. One program for each multiprocessor works on one tile after the other, and loads the next
    tile while it stores the last one.
    """
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    num_tiles = triton.cdiv(num_rows, _TILE_ROWS) * triton.cdiv(num_outputs, _TILE_COLUMNS)
    _linear_gelu[(min(num_tiles, _num_multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x, [_TILE_ROWS, _TILE_INNER]),
        TensorDescriptor.from_tensor(weight, [_TILE_COLUMNS, _TILE_INNER]),
        bias,
        TensorDescriptor.from_tensor(out, [_TILE_ROWS, _TILE_COLUMNS // 2]),
        num_rows, num_inputs, num_outputs, _TILE_ROWS, _TILE_COLUMNS, _TILE_INNER, _GROUP,
        num_warps=8, num_stages=_NUM_STAGES, **_OPTIONS,
    )  # fmt: skip
    return out


def add_norm(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """Add a bias and a residual, and normalize the rows."""
    num_rows, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_norm[(num_rows,)](
        x, bias, residual, norm.weight, norm.bias, out, norm.eps, width, block,
        num_warps=_num_warps(block), **_OPTIONS,
    )  # fmt: skip
    return out


def quantize(x: Tensor) -> Quantized:
    """Quantize each row to float8."""
    num_rows, width = x.shape
    out = _empty(x)
    block = triton.next_power_of_2(width)
    _quantize[(num_rows,)](x, *out, width, block, num_warps=_num_warps(block), **_OPTIONS)
    return out


def bias_gelu_quantize(x: Tensor, bias: Tensor) -> Quantized:
    """Add a bias, apply the exact GELU, and quantize each row."""
    num_rows, width = x.shape
    out = _empty(x)
    block = triton.next_power_of_2(width)
    _bias_gelu_quantize[(num_rows,)](x, bias, *out, width, block, num_warps=_num_warps(block), **_OPTIONS)
    return out


def add_norm_quantize(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
    """Add a bias and a residual, and normalize; also quantize each row without the bias of the norm."""
    num_rows, width = x.shape
    out, quantized = torch.empty_like(x), _empty(x)
    block = triton.next_power_of_2(width)
    _add_norm_quantize[(num_rows,)](
        x, bias, residual, norm.weight, norm.bias, out, *quantized, norm.eps, width, block,
        num_warps=_num_warps(block), **_OPTIONS,
    )  # fmt: skip
    return out, quantized


def _empty(x: Tensor) -> Quantized:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return Quantized(codes, torch.empty(len(x), 1, dtype=torch.float32, device=x.device))


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # Triton's interpreter then lets each program work on several tiles, as a device does
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_warps(block: int) -> int:
    return 4 if block <= 2048 else 8


@triton.jit
def _bias_gelu(x, bias, out, width: tl.constexpr, block: tl.constexpr):
    # 64 bits, because a large batch has more elements than 32 bits can index.
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    values = _load(x + start, columns, inside) + _load(bias, columns, inside)
    tl.store(out + start + columns, _gelu(values), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_gelu(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_inputs: tl.constexpr,
    num_outputs: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_inner: tl.constexpr,
    group: tl.constexpr,
):
    num_blocks = tl.cdiv(num_rows, tile_rows)
    num_tiles = num_blocks * tl.cdiv(num_outputs, tile_columns)
    # Go through the tiles of a group of row blocks column by column.
    per_group = group * tl.cdiv(num_outputs, tile_columns)
    half: tl.constexpr = tile_columns // 2
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        first_block = tile // per_group * group
        in_group = tl.minimum(num_blocks - first_block, group)
        row = (first_block + tile % per_group % in_group) * tile_rows
        column = tile % per_group // in_group * tile_columns
        sums = tl.zeros((tile_rows, tile_columns), tl.float32)
        for start in range(0, num_inputs, tile_inner):
            # Elements outside a matrix are loaded as zeros, and are not stored.
            a, b = x.load([row, start]), weight.load([column, start])
            sums = tl.dot(a, b.T, sums, input_precision="ieee")
        # Store the halves one after the other, which takes half the shared memory.
        left, right = tl.split(tl.permute(tl.reshape(sums, (tile_rows, 2, half)), (0, 2, 1)))
        left = _gelu(left + _load_part(bias, column, half, num_outputs))
        out.store([row, column], left.to(out.dtype))
        right = _gelu(right + _load_part(bias, column + half, half, num_outputs))
        out.store([row, column + half], right.to(out.dtype))


@triton.jit
def _load_part(bias, start, size: tl.constexpr, num_outputs: tl.constexpr):
    columns = start + tl.arange(0, size)
    return _load(bias, columns, columns < num_outputs)[None, :]


@triton.jit
def _add_norm(x, bias, residual, weight, shift, out, eps, width: tl.constexpr, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, block)
    inside = columns < width
    values = _load(x + start, columns, inside) + _load(bias, columns, inside)
    values += _load(residual + start, columns, inside)
    values = _normalize(values, weight, eps, columns, inside, width) + _load(shift, columns, inside)
    tl.store(out + start + columns, values, mask=inside)


@triton.jit
def _quantize(x, codes, scales, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = _load(x + row * width, columns, inside)
    _store_quantized(values, codes + row * width, scales + row, columns, inside)


@triton.jit
def _bias_gelu_quantize(x, bias, codes, scales, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = _gelu(_load(x + row * width, columns, inside) + _load(bias, columns, inside))
    _store_quantized(values, codes + row * width, scales + row, columns, inside)


@triton.jit
def _add_norm_quantize(
    x, bias, residual, weight, shift, out, codes, scales, eps, width: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    columns = tl.arange(0, block)
    inside = columns < width
    values = _load(x + start, columns, inside) + _load(bias, columns, inside)
    values += _load(residual + start, columns, inside)
    values = _normalize(values, weight, eps, columns, inside, width)
    tl.store(out + start + columns, values + _load(shift, columns, inside), mask=inside)
    _store_quantized(values, codes + start, scales + row, columns, inside)


@triton.jit
def _load(row, columns, inside):
    return tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gelu(x):
    # x * Phi(x) = max(x, 0) - |x| * Phi(-|x|), where Phi is the normal distribution function. Phi(-|x|) is
    # nearly a polynomial of t = 1 / (1 + p * |x|) times exp(-x * x / 2), as in formula 26.2.17 of Abramowitz
    # and Stegun, Handbook of Mathematical Functions (1964). With these coefficients, which were fitted for
    # this purpose, the relative error of the GELU is below 5e-6 down to the smallest normal float16. CUDA's
    # error function takes twice as many instructions, and 1 + erf(x) loses digits where x is negative.
    size = tl.abs(x)
    denominator = 1.0 + 0.34931009925917605 * size
    t = tl.math.rsqrt(denominator * denominator)  # a division takes more instructions
    tail = 0.2875039465801188 - 0.10104812992355604 * t
    tail = 0.17188648626971376 + t * (0.005862408798569266 + t * tail)
    tail = t * (0.13579370850233421 + t * tail)
    return tl.maximum(x, 0.0) - size * tail * tl.math.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _normalize(values, weight, eps, columns, inside, width: tl.constexpr):
    # Compute the mean first, and then the deviations. The difference of two large sums would be inexact.
    mean = tl.sum(values, 0) / width
    deviations = tl.where(inside, values - mean, 0.0)
    variance = tl.sum(deviations * deviations, 0) / width
    return deviations / tl.sqrt(variance + eps) * _load(weight, columns, inside)


@triton.jit
def _store_quantized(values, codes, scale, columns, inside):
    # 448 is the largest float8 number, and larger values round to it. Values are not clamped, because that
    # would turn NaN into a number.
    peak = tl.maximum(tl.max(tl.where(inside, tl.abs(values), 0.0), 0), 1e-12)
    row_scale = peak / 448.0
    tl.store(codes + columns, (values / row_scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale, row_scale)
