"""Layers with matrix products in float8 (e4m3). Weights are scaled by output row, activations by token.

Attention, embeddings and the residual stream are bfloat16. Norms, GELU, softmax and the head compute in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from bge_rerank_integrations.engine.blocks import Norm, Parameters, Quantized, Rows
from bge_rerank_integrations.engine.cuda.fused_ops import PLAIN_OPS, FusedOps
from bge_rerank_integrations.errors import ConfigError, DeviceError
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

_MULTIPLE: Final = 16
# Numbers of rows that a product is tried with: a single row, and a prime number.
_TRIED_ROWS: Final = (1, 37)


def scaled_product(rows: Quantized, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """Multiply quantized rows [rows, in] with a quantized weight [out, in] to bfloat16 [rows, out].

    `in` and `out` must be multiples of 16, and `rows` may be any number; torch/_meta_registrations.py has the
    conditions. Sums are accumulated in float32. Hopper's fast accumulation is off, because it rounds the sums
    at each step.
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
    """Layers whose matrix products are in float8. The kernel that computes an input also quantizes it.

    Rows are quantized without the bias of the norm that computed them. That bias is the same in every row, so
    its product with the weight is computed at load time and added to the bias of the linear layer. This takes
    no time per batch, and the norm's bias is never rounded to float8.

    Args:
        ops: The operators between the products.
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
    """Return the float32 bias of a linear layer whose input lacks the bias of the norm `before`."""
    return linear.bias.float() + linear.weight.float() @ before.bias.float()


def check_float8(device: torch.device, widths: tuple[int, int]) -> None:
    """Try float8 products of a model's widths, before its weights are loaded.

    Args:
        device: The device to run on.
        widths: The hidden size and the intermediate size of the model.

    Raises:
        ConfigError: A width is not a multiple of 16.
        DeviceError: The installed torch cannot multiply in float8 on this device, or its results are wrong.
    """
    if any(width % _MULTIPLE for width in widths):
        raise ConfigError(
            f"dtype 'float8' needs widths that are multiples of {_MULTIPLE}, but this model's are "
            f"{widths[0]} and {widths[1]}; use 'bfloat16'"
        )
    try:
        with torch.inference_mode():
            for num_inputs, num_outputs in (widths, widths[::-1]):
                _try_product(device, num_inputs, num_outputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # torch raises several types, and the comparison raises AssertionError
        raise_if_of_signal_handler(error)
        reason = first_line(error)
        raise DeviceError(
            f"dtype 'float8' does not work on {device} with torch {torch.__version__} "
            f"({type(error).__name__}: {reason}); use 'bfloat16'"
        ) from error


def _try_product(device: torch.device, num_inputs: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(num_outputs, num_inputs, dtype=torch.float32, generator=generator).to(device)
    bias = torch.randn(num_outputs, dtype=torch.float32, generator=generator).to(device, torch.bfloat16)
    weight = PLAIN_OPS.quantize(matrix)
    for num_rows in _TRIED_ROWS:
        rows = PLAIN_OPS.quantize(
            torch.randn(num_rows, num_inputs, dtype=torch.float32, generator=generator).to(device)
        )
        expected = dequantize(rows) @ dequantize(weight).t()
        # The sums have terms of both signs, so a small result can have the absolute error of a large one.
        tolerance = 0.01 * expected.abs().max().item()
        for shift in (None, bias):
            ours = scaled_product(rows, weight, shift).float()
            shifted = expected if shift is None else expected + shift.float()
            torch.testing.assert_close(ours, shifted, rtol=0.02, atol=tolerance)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the float32 values of quantized rows."""
    return quantized.codes.float() * quantized.scales


def _quantized(rows: Rows) -> Quantized:
    assert rows.quantized is not None  # every part of `Float8Blocks` quantizes its rows
    return rows.quantized
