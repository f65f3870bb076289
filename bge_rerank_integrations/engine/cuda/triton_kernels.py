"""Fused kernels in Triton. They are imported only if Triton is installed, and tried before they are used.

Each program works on one row or a part of a row, or on a tile of a product. A new number of rows does not
compile a new kernel: it determines only the grid, or it is an argument that Triton must not specialize on.
The widths are constants of the model. Triton also compiles different kernels for addresses that are multiples
of 16 and for others. Every tensor here starts at the beginning of an allocation, and torch's allocator
returns multiples of 512.
"""

# Without `from __future__ import annotations`, since Triton reads the annotations at run time.
import torch
import triton
import triton.language as tl
from torch import Tensor

from bge_rerank_integrations.engine.blocks import Norm, Quantized

TRITON = triton.__version__

# Most elements of a row that one program of an elementwise kernel processes.
_MAX_BLOCK = 1024
# The tile of a product that one program computes, and how much of the inner dimension it loads at once. Three
# such loads fit into the shared memory of every device of compute capability 8.0 or later.
_TILE_ROWS, _TILE_COLUMNS, _TILE_INNER = 128, 128, 64
_NUM_STAGES = 3
# Programs that run at the same time work on tiles of this many neighbouring blocks of rows, so that they find
# the weight in the cache.
_GROUP = 8


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias and apply the exact GELU."""
    num_rows, width = x.shape
    out = torch.empty_like(x)
    block = min(triton.next_power_of_2(width), _MAX_BLOCK)
    _bias_gelu[(num_rows, triton.cdiv(width, block))](x, bias, out, width, block)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply by a weight [out, in], add a bias, and apply the exact GELU to the float32 sums."""
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_rows, _TILE_ROWS) * triton.cdiv(num_outputs, _TILE_COLUMNS),)
    _linear_gelu[grid](
        x, weight, bias, out, num_rows, num_inputs, num_outputs,
        _TILE_ROWS, _TILE_COLUMNS, _TILE_INNER, _GROUP, num_warps=8, num_stages=_NUM_STAGES,
    )  # fmt: skip
    return out


def add_norm(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """Add a bias and a residual, and normalize the rows."""
    num_rows, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_norm[(num_rows,)](
        x, bias, residual, norm.weight, norm.bias, out, norm.eps, width, block, num_warps=_num_warps(block)
    )
    return out


def quantize(x: Tensor) -> Quantized:
    """Quantize each row to float8."""
    num_rows, width = x.shape
    out = _empty(x)
    block = triton.next_power_of_2(width)
    _quantize[(num_rows,)](x, *out, width, block, num_warps=_num_warps(block))
    return out


def bias_gelu_quantize(x: Tensor, bias: Tensor) -> Quantized:
    """Add a bias, apply the exact GELU, and quantize each row."""
    num_rows, width = x.shape
    out = _empty(x)
    block = triton.next_power_of_2(width)
    _bias_gelu_quantize[(num_rows,)](x, bias, *out, width, block, num_warps=_num_warps(block))
    return out


def add_norm_quantize(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
    """Add a bias and a residual, and normalize; also quantize each row without the bias of the norm."""
    num_rows, width = x.shape
    out, quantized = torch.empty_like(x), _empty(x)
    block = triton.next_power_of_2(width)
    _add_norm_quantize[(num_rows,)](
        x, bias, residual, norm.weight, norm.bias, out, *quantized, norm.eps, width, block,
        num_warps=_num_warps(block),
    )  # fmt: skip
    return out, quantized


def _empty(x: Tensor) -> Quantized:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return Quantized(codes, torch.empty(len(x), 1, dtype=torch.float32, device=x.device))


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
    # Go through the tiles of a group of row blocks column by column.
    num_blocks = tl.cdiv(num_rows, tile_rows)
    per_group = group * tl.cdiv(num_outputs, tile_columns)
    first_block = tl.program_id(0) // per_group * group
    in_group = tl.minimum(num_blocks - first_block, group)
    place = tl.program_id(0) % per_group
    rows = (first_block + place % in_group) * tile_rows + tl.arange(0, tile_rows)
    columns = place // in_group * tile_columns + tl.arange(0, tile_columns)
    inner = tl.arange(0, tile_inner)
    # 64 bits, because a large batch has more elements than 32 bits can index.
    rows64, columns64 = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    total = tl.zeros((tile_rows, tile_columns), tl.float32)
    for start in range(0, num_inputs, tile_inner):
        is_input = start + inner < num_inputs
        a = tl.load(
            x + rows64 * num_inputs + (start + inner)[None, :],
            mask=(rows < num_rows)[:, None] & is_input[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + columns64 * num_inputs + (start + inner)[:, None],
            mask=(columns < num_outputs)[None, :] & is_input[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    values = _gelu(total + _load(bias, columns, columns < num_outputs)[None, :])
    inside = (rows < num_rows)[:, None] & (columns < num_outputs)[None, :]
    tl.store(out + rows64 * num_outputs + columns64, values, mask=inside)


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
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


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
