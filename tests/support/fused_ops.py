"""Checks that compare fused operators with float64."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.attention import triton_attention
from bge_rerank_integrations.engine.attention_trial import try_attention
from bge_rerank_integrations.engine.blocks import Norm
from bge_rerank_integrations.engine.cuda.fused_ops import FusedOps
from bge_rerank_integrations.engine.cuda.linear_gelu import LinearGelu

HALF = (torch.float16, torch.bfloat16)


def check_values(ops: FusedOps, dtype: torch.dtype, num_rows: int, width: int, device: str = "cpu") -> None:
    """Compare `bias_gelu` and `add_norm` with float64. Only the result may be rounded."""
    generator = torch.Generator().manual_seed(num_rows * width)

    def random(*size: int) -> Tensor:
        return (2 * torch.randn(*size, generator=generator)).to(device, dtype)

    x, residual, bias = random(num_rows, width), random(num_rows, width), random(width)
    norm = Norm(random(width), random(width), 1e-5)
    rtol = max(torch.finfo(dtype).eps, 1e-6)
    gelu = ops.bias_gelu(x, bias)
    assert (gelu.dtype, gelu.shape) == (dtype, x.shape)
    torch.testing.assert_close(gelu.double(), F.gelu(x.double() + bias.double()), rtol=rtol, atol=1e-5)
    normed = ops.add_norm(x, bias, residual, norm)
    assert (normed.dtype, normed.shape) == (dtype, x.shape)
    expected = F.layer_norm(
        x.double() + bias.double() + residual.double(),
        (width,),
        norm.weight.double(),
        norm.bias.double(),
        norm.eps,
    )
    torch.testing.assert_close(normed.double(), expected, rtol=rtol, atol=1e-5)


def check_linear(
    run: LinearGelu, dtype: torch.dtype, num_rows: int, width: int, inner: int, device: str = "cpu"
) -> None:
    """Compare a fused up projection with float64. Only the result may be rounded."""
    generator = torch.Generator().manual_seed(num_rows * width)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    x, weight, bias = random(num_rows, width), random(inner, width) * width**-0.5, random(inner)
    result = run(x, weight, bias)
    assert (result.dtype, result.shape) == (dtype, (num_rows, inner))
    exact = F.gelu(x.double() @ weight.double().t() + bias.double())
    rtol = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=1e-5)


def check_quantizing(
    ops: FusedOps, dtype: torch.dtype, num_rows: int, width: int, device: str = "cpu"
) -> None:
    """Compare the quantizing operators with values that torch's own functions compute."""
    generator = torch.Generator().manual_seed(num_rows * width)

    def random(*size: int) -> Tensor:
        return (2 * torch.randn(*size, generator=generator)).to(device, dtype)

    x, residual, bias = random(num_rows, width), random(num_rows, width), random(width)
    x[0] = 0
    norm = Norm(random(width), random(width), 1e-5)
    values, normed = ops.add_norm_quantize(x, bias, residual, norm)
    assert (values.dtype, values.shape) == (dtype, x.shape)
    total = x.double() + bias.double() + residual.double()
    unshifted = F.layer_norm(total, (width,), norm.weight.double(), None, norm.eps)
    rtol = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(values.double(), unshifted + norm.bias.double(), rtol=rtol, atol=1e-5)
    for ours, exact in (
        (ops.quantize(x), x.float()),
        (ops.bias_gelu_quantize(x, bias.float()), F.gelu(x.float() + bias.float())),
        (normed, unshifted.float()),
    ):
        assert (ours.codes.dtype, ours.codes.shape) == (torch.float8_e4m3fn, x.shape)
        assert (ours.scales.dtype, ours.scales.shape) == (torch.float32, (num_rows, 1))
        peaks = exact.abs().amax(1, keepdim=True)
        torch.testing.assert_close(ours.scales * 448, peaks.clamp_min(1e-12), rtol=1e-5, atol=1e-6)
        scaled = exact / ours.scales
        wrong = (ours.codes.float() - scaled).abs() > scaled.abs() / 16 + 2**-10
        if os.environ.get("TRITON_INTERPRET"):
            # Triton's interpreter drops the carry if a number rounds up to a power of two, and truncates
            # subnormal numbers instead of rounding them. Devices round correctly.
            nearest = scaled.to(torch.float8_e4m3fn).float()
            carries = (nearest.frexp().mantissa.abs() == 0.5) & (scaled.abs() < 1.0001 * nearest.abs())
            wrong &= ~(carries | (scaled.abs() < 1.01 * 2**-6))
        assert not wrong.any()


def check_interpreted_kernels() -> None:
    """Run the Triton kernels on the CPU. Needs its own process, with TRITON_INTERPRET set before the import."""
    from bge_rerank_integrations.engine.cuda import triton_kernels as kernels

    ops = FusedOps(
        "interpreted",
        kernels.linear_gelu,
        kernels.bias_gelu,
        kernels.add_norm,
        kernels.quantize,
        kernels.bias_gelu_quantize,
        kernels.add_norm_quantize,
    )
    for dtype in (torch.float32, *HALF):
        for num_rows, width in ((1, 384), (7, 384), (1, 768), (7, 1000), (1, 1024), (7, 4096)):
            check_values(ops, dtype, num_rows, width)
            check_quantizing(ops, dtype, num_rows, width)
    # The interpreter multiplies the bits of bfloat16 numbers as if they were integers, so leave bfloat16 out.
    for dtype in (torch.float32, torch.float16):
        for num_rows, width, inner in ((1, 64, 128), (37, 104, 296)):  # the second case fills no tile
            check_linear(kernels.linear_gelu, dtype, num_rows, width, inner)
    # More blocks of rows than a group of programs works on.
    check_linear(kernels.linear_gelu, torch.float16, 1153, 24, 264)
    check_values(ops, torch.bfloat16, 1025, 384)
    check_quantizing(ops, torch.bfloat16, 7, 4096)
    for dtype in (torch.float32, torch.float16):
        for head_dim in (16, 32, 64, 128):
            try_attention(triton_attention, torch.device("cpu"), dtype, head_dim, works_in_graphs=True)
    print("all agree")
