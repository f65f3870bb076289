"""Encoder products in float8 (e4m3), weights scaled by output row and activations by token.

Attention is in bfloat16, as are the embeddings and the residual stream; norms, GELU and softmax compute in
float32, and the head is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from bge_rerank_integrations.engine.blocks import Norm, Parameters, Quantized, Rows
from bge_rerank_integrations.engine.cuda.fused_ops import PLAIN_OPS, FusedOps
from bge_rerank_integrations.errors import ConfigError, DeviceError

_MULTIPLE: Final = 16
# Rows that a product is tried with: one, and a number that is no multiple of anything.
_TRIED_ROWS: Final = (1, 37)


def scaled_product(rows: Quantized, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """Multiply quantized [rows, in] with a quantized weight [out, in]: bfloat16 [rows, out].

    `in` and `out` are multiples of 16; the number of rows is free (torch/_meta_registrations.py has the
    conditions). Sums are kept in float32: Hopper's faster way rounds them at each step, which float8 with
    its coarse terms may or may not bear.
    """
    product: Tensor = torch._scaled_mm(
        rows.codes,
        weight.codes.t(),
        scale_a=rows.scales,
        scale_b=weight.scales.reshape(1, -1),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return product


class Float8Blocks:
    """Layers whose products are float8; what goes into one is quantized by the kernel that makes it.

    A norm's bias is the same in every row, and its product with a weight is known beforehand. So rows are
    quantized without it, and that product is part of the linear layer's own bias: what is never rounded to
    three bits adds no error, and costs nothing.

    Args:
        ops: What lies between the products.
    """

    def __init__(self, ops: FusedOps) -> None:
        self._ops = ops

    def embed(self, token_type: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Rows]:
        """See `Blocks`."""
        return lambda words, positions: Rows(*self._ops.add_norm_quantize(words, token_type, positions, norm))

    def project(self, linear: Parameters, before: Norm) -> Callable[[Rows], Tensor]:
        """See `Blocks`."""
        bias = _bias_after(linear, before).to(torch.bfloat16)
        weight = PLAIN_OPS.quantize(linear.weight)
        return lambda rows: scaled_product(_quantized(rows), weight, bias)

    def attention_output(self, linear: Parameters, norm: Norm) -> Callable[[Tensor, Rows], Rows]:
        """See `Blocks`."""
        weight, bias = PLAIN_OPS.quantize(linear.weight), linear.bias

        def run(attended: Tensor, residual: Rows) -> Rows:
            product = scaled_product(self._ops.quantize(attended), weight)
            return Rows(*self._ops.add_norm_quantize(product, bias, residual.values, norm))

        return run

    def feed_forward(
        self, up: Parameters, down: Parameters, before: Norm, norm: Norm
    ) -> Callable[[Rows], Rows]:
        """See `Blocks`."""
        up_bias, up_weight = _bias_after(up, before), PLAIN_OPS.quantize(up.weight)
        down_weight, down_bias = PLAIN_OPS.quantize(down.weight), down.bias

        def run(rows: Rows) -> Rows:
            inner = self._ops.bias_gelu_quantize(scaled_product(_quantized(rows), up_weight), up_bias)
            product = scaled_product(inner, down_weight)
            return Rows(*self._ops.add_norm_quantize(product, down_bias, rows.values, norm))

        return run


def _bias_after(linear: Parameters, before: Norm) -> Tensor:
    """Return a linear layer's bias over rows without the bias of the norm before it, in float32."""
    return linear.bias.float() + linear.weight.float() @ before.bias.float()


def check_float8(device: torch.device, widths: tuple[int, int]) -> None:
    """Try a model's products in float8, before its weights are loaded.

    Args:
        device: Where they are to run.
        widths: The model's, of the residual stream and of the feed-forward part.

    Raises:
        ConfigError: The model's widths do not go with float8.
        DeviceError: torch, as it is here, cannot multiply in float8 on this device, or does so wrongly.
    """
    if any(width % _MULTIPLE for width in widths):
        raise ConfigError(
            f"dtype 'float8' takes widths that are multiples of {_MULTIPLE}, and this model's are "
            f"{widths[0]} and {widths[1]}; use 'bfloat16'"
        )
    try:
        with torch.inference_mode():
            for num_inputs, num_outputs in (widths, widths[::-1]):
                _try_product(device, num_inputs, num_outputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # torch raises several types, and the comparison one more
        reason = next(iter(str(error).splitlines()), "")
        raise DeviceError(
            f"dtype 'float8' does not work on {device} with torch {torch.__version__} "
            f"({type(error).__name__}: {reason}); use 'bfloat16'"
        ) from error


def _try_product(device: torch.device, num_inputs: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(num_outputs, num_inputs, generator=generator).to(device)
    bias = torch.randn(num_outputs, generator=generator).to(device, torch.bfloat16)
    weight = PLAIN_OPS.quantize(matrix)
    for num_rows in _TRIED_ROWS:
        rows = PLAIN_OPS.quantize(torch.randn(num_rows, num_inputs, generator=generator).to(device))
        expected = dequantize(rows) @ dequantize(weight).t()
        # The sums' terms are of both signs: what is small is the rest of large ones.
        tolerance = 0.01 * expected.abs().max().item()
        for shift in (None, bias):
            ours = scaled_product(rows, weight, shift).float()
            shifted = expected if shift is None else expected + shift.float()
            torch.testing.assert_close(ours, shifted, rtol=0.02, atol=tolerance)


def dequantize(quantized: Quantized) -> Tensor:
    """Return what quantized rows stand for, in float32."""
    return quantized.codes.float() * quantized.scales


def _quantized(rows: Rows) -> Quantized:
    assert rows.quantized is not None  # these blocks make no others
    return rows.quantized
