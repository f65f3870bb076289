"""What lies between two matrix products in one kernel instead of several, where Triton works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.blocks import Norm, Parameters, Quantized, Rows
from bge_rerank_integrations.engine.linear import plain_linear

logger = logging.getLogger(__name__)

# Tried on so many rows: an odd number, as requests have.
_NUM_TRIED_ROWS: Final = 7
_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max


class FusedOps(NamedTuple):
    """Operators over [rows, width]; all compute in float32 and round once.

    Attributes:
        name: What they run in, and where that was not the first choice, why.
        bias_gelu: x and a bias to gelu(x + bias), with the exact GELU.
        add_norm: x, a bias, a residual and a norm to norm(x + bias + residual).
        quantize: x to float8, each row scaled so that its largest number is the largest of the type.
        bias_gelu_quantize: `bias_gelu`, quantized.
        add_norm_quantize: `add_norm`, and the same less the norm's bias, quantized.
    """

    name: str
    bias_gelu: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, Norm], Tensor]
    quantize: Callable[[Tensor], Quantized]
    bias_gelu_quantize: Callable[[Tensor, Tensor], Quantized]
    add_norm_quantize: Callable[[Tensor, Tensor, Tensor, Norm], tuple[Tensor, Quantized]]

    @property
    def is_plain(self) -> bool:
        """Whether these are torch's own operators."""
        return self.add_norm is PLAIN_OPS.add_norm


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.float() + bias.float())


def _add_norm(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    total = x.float() + bias.float() + residual.float()
    return F.layer_norm(total, norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _quantize(x: Tensor) -> Quantized:
    values = x.float()
    scales = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / _LARGEST
    # What is not a number stays none: a score made of it is refused.
    return Quantized((values / scales).to(torch.float8_e4m3fn), scales)


def _add_norm_quantize(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
    values = _add_norm(x, bias, residual, norm._replace(bias=torch.zeros_like(norm.bias)))
    return (values + norm.bias.float()).to(x.dtype), _quantize(values)


PLAIN_OPS: Final = FusedOps(
    "plain operators",
    bias_gelu=lambda x, bias: _bias_gelu(x, bias).to(x.dtype),
    add_norm=lambda x, bias, residual, norm: _add_norm(x, bias, residual, norm).to(x.dtype),
    quantize=_quantize,
    bias_gelu_quantize=lambda x, bias: _quantize(_bias_gelu(x, bias)),
    add_norm_quantize=_add_norm_quantize,
)
"""What the kernels are to give, from torch's own operators; runs anywhere."""


def resolve_fused(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int], *, quantizing: bool
) -> FusedOps:
    """Choose how to compute between products, and log it. Never raises.

    Triton compiles at the first call, which takes a C compiler on some systems, and a kernel that compiles
    may still be wrong on a device nobody has tried it on. So each kernel runs here once, on a model's own
    widths, and is compared; whatever fails leaves plain operators. What succeeded is compiled, once for all
    numbers of rows: no request compiles anything.

    Args:
        device: Where they run.
        dtype: Of what they read.
        widths: A model's, of the residual stream and of the feed-forward part.
        quantizing: Whether those that quantize are needed too, which older devices cannot compile.
    """
    ops = PLAIN_OPS
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        try:
            ops = _triton_ops()
            with torch.cuda.device(device), torch.inference_mode():
                check_ops(ops, device, dtype, widths, quantizing=quantizing)
        except Exception as error:  # of the import, the compiler, the driver, or the comparison
            reason = next(iter(str(error).splitlines()), "")
            ops = PLAIN_OPS._replace(name=f"{PLAIN_OPS.name} ({type(error).__name__}: {reason})")
    logger.info("between products on %s in %s: %s", device, dtype, ops.name)
    return ops


def check_ops(
    ops: FusedOps, device: torch.device, dtype: torch.dtype, widths: tuple[int, int], *, quantizing: bool
) -> None:
    """Run operators beside the plain ones.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return (2 * torch.randn(*size, generator=generator)).to(device, dtype)

    width, inner = widths
    x, residual, bias = random(_NUM_TRIED_ROWS, width), random(_NUM_TRIED_ROWS, width), random(width)
    norm = Norm(random(width), random(width), 1e-5)
    up, up_bias = random(_NUM_TRIED_ROWS, inner), random(inner)
    close = torch.testing.assert_close
    close(ops.bias_gelu(up, up_bias), PLAIN_OPS.bias_gelu(up, up_bias))
    expected = PLAIN_OPS.add_norm(x, bias, residual, norm)
    close(ops.add_norm(x, bias, residual, norm), expected)
    if not quantizing:
        return
    check_quantized(ops.quantize(x), PLAIN_OPS.quantize(x))
    # This one's bias is float32 in use, and Triton compiles for the type.
    wide_bias = up_bias.float()
    check_quantized(ops.bias_gelu_quantize(up, wide_bias), PLAIN_OPS.bias_gelu_quantize(up, wide_bias))
    values, quantized = ops.add_norm_quantize(x, bias, residual, norm)
    close(values, expected)
    check_quantized(quantized, PLAIN_OPS.add_norm_quantize(x, bias, residual, norm)[1])


def check_quantized(ours: Quantized, theirs: Quantized) -> None:
    """Raise `AssertionError` if two quantizations of the same rows differ by more than rounding."""
    torch.testing.assert_close(ours.scales, theirs.scales)
    # Neighbours, since a number may lie at the boundary: an eighth apart, or the step of the smallest.
    torch.testing.assert_close(ours.codes.float(), theirs.codes.float(), rtol=1 / 8, atol=2**-9)


class FusedBlocks:
    """Layers whose products leave the bias to the kernel that follows.

    cuBLASLt can add a bias while it writes a product, and torch asks it to where it can, but the exact GELU
    it cannot apply (`torch._addmm_activation` has the approximation by tanh, which gives other scores). So a
    kernel has to read the product in any case, and adds the bias to what it holds, for nothing. Queries,
    keys and values have no such kernel; their bias stays with the product.

    Args:
        ops: What follows the products.
    """

    def __init__(self, ops: FusedOps) -> None:
        self._ops = ops

    def embed(self, token_type: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Rows]:
        """See `Blocks`."""
        return lambda words, positions: Rows(self._ops.add_norm(words, token_type, positions, norm))

    def project(self, linear: Parameters, before: Norm) -> Callable[[Rows], Tensor]:  # noqa: ARG002
        """See `Blocks`."""
        run = plain_linear(*linear)
        return lambda rows: run(rows.values)

    def attention_output(self, linear: Parameters, norm: Norm) -> Callable[[Tensor, Rows], Rows]:
        """See `Blocks`."""
        weight, bias = linear

        def run(attended: Tensor, residual: Rows) -> Rows:
            return Rows(self._ops.add_norm(F.linear(attended, weight), bias, residual.values, norm))

        return run

    def feed_forward(
        self,
        up: Parameters,
        down: Parameters,
        before: Norm,  # noqa: ARG002
        norm: Norm,
    ) -> Callable[[Rows], Rows]:
        """See `Blocks`."""

        def run(rows: Rows) -> Rows:
            inner = self._ops.bias_gelu(F.linear(rows.values, up.weight), up.bias)
            return Rows(self._ops.add_norm(F.linear(inner, down.weight), down.bias, rows.values, norm))

        return run


def _triton_ops() -> FusedOps:
    from bge_rerank_integrations.engine.cuda.triton_kernels import (
        TRITON,
        add_norm,
        add_norm_quantize,
        bias_gelu,
        bias_gelu_quantize,
        quantize,
    )

    return FusedOps(f"Triton {TRITON}", bias_gelu, add_norm, quantize, bias_gelu_quantize, add_norm_quantize)
