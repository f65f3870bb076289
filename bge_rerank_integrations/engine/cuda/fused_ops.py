"""Operators between matrix products, fused into one Triton kernel each where Triton works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.blocks import Norm, Parameters, Quantized, Rows
from bge_rerank_integrations.engine.cuda.linear_gelu import (
    LinearGelu,
    least_fused_rows,
    plain_linear_gelu,
)
from bge_rerank_integrations.engine.current_device import on_device
from bge_rerank_integrations.engine.linear import plain_linear
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

logger = logging.getLogger(__name__)

# Number of rows that the kernels are tried on. It is odd, since most requests have no round number of rows.
_NUM_TRIED_ROWS: Final = 7
_TRITON_CAPABILITY: Final = (8, 0)
_TILE_COPY_CAPABILITY: Final = (9, 0)
_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max


class FusedOps(NamedTuple):
    """Operators over [rows, width]. All compute in float32 and round the result once.

    Attributes:
        name: The implementation. For a fallback, the name includes the reason.
        linear_gelu: Maps x, a weight and a bias to gelu(x @ weight.t() + bias), with the exact GELU.
        bias_gelu: Maps x and a bias to gelu(x + bias), with the exact GELU.
        add_norm: Maps x, a bias, a residual and a norm to norm(x + bias + residual).
        quantize: Maps x to float8. Each row is scaled so that its largest absolute value becomes the largest
            float8 number.
        bias_gelu_quantize: `bias_gelu`, then `quantize`.
        add_norm_quantize: Returns `add_norm`, and the quantized rows without the norm's bias.
    """

    name: str
    linear_gelu: LinearGelu
    bias_gelu: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, Norm], Tensor]
    quantize: Callable[[Tensor], Quantized]
    bias_gelu_quantize: Callable[[Tensor, Tensor], Quantized]
    add_norm_quantize: Callable[[Tensor, Tensor, Tensor, Norm], tuple[Tensor, Quantized]]

    @property
    def is_plain(self) -> bool:
        """Whether these are torch's own operators."""
        # A fallback has the same operators under another name, so whole tuples may differ. One operator is
        # enough, because every other implementation has its own `add_norm`.
        return self.add_norm is PLAIN_OPS.add_norm


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.float() + bias.float())


def _add_norm(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    total = x.float() + bias.float() + residual.float()
    return F.layer_norm(total, norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _quantize(x: Tensor) -> Quantized:
    values = x.float()
    scales = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / _LARGEST
    # NaN and infinity must not become finite here, because the package refuses scores that are not finite.
    return Quantized((values / scales).to(torch.float8_e4m3fn), scales)


def _add_norm_quantize(x: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Quantized]:
    values = _add_norm(x, bias, residual, norm._replace(bias=torch.zeros_like(norm.bias)))
    return (values + norm.bias.float()).to(x.dtype), _quantize(values)


PLAIN_OPS: Final = FusedOps(
    "plain operators",
    linear_gelu=plain_linear_gelu,
    bias_gelu=lambda x, bias: _bias_gelu(x, bias).to(x.dtype),
    add_norm=lambda x, bias, residual, norm: _add_norm(x, bias, residual, norm).to(x.dtype),
    quantize=_quantize,
    bias_gelu_quantize=lambda x, bias: _quantize(_bias_gelu(x, bias)),
    add_norm_quantize=_add_norm_quantize,
)
"""The reference implementation in torch's own operators, which works on every device."""


def resolve_fused(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int], *, quantizing: bool
) -> FusedOps:
    """Choose the operators between matrix products, and log the choice. Never raises.

    Triton compiles a kernel at its first call, which needs a C compiler on some systems. A kernel that
    compiles may still be wrong on an untested device. This function therefore runs each kernel once, on the
    model's own widths, and compares the result with the plain operators. After any failure it returns the
    plain operators. The compiled kernels work for every number of rows, so no request waits for a compiler.

    Devices before compute capability 8.0 are left out, because there the compiler can fail in a way that ends
    the process, and nothing can catch that.

    Args:
        device: The device to run on.
        dtype: The precision of the inputs.
        widths: The hidden size and the intermediate size of the model.
        quantizing: Whether the model calls the quantizing operators, as in float8, or the others. Older
            devices cannot compile the quantizing ones.
    """
    ops = PLAIN_OPS
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        try:
            _check_capability(device)
            ops = _triton_ops()
            with on_device(device), torch.inference_mode():
                check_ops(ops, device, dtype, widths, quantizing=quantizing)
                # A row is quantized after all of its GELUs are known.
                if not quantizing and _copies_tiles(device):
                    ops = _with_linear_gelu(ops, device, dtype, widths)
        except Exception as error:  # the import, the compiler, the driver or the comparison failed
            raise_if_of_signal_handler(error)
            reason = first_line(error)
            ops = PLAIN_OPS._replace(name=f"{PLAIN_OPS.name} ({type(error).__name__}: {reason})")
    logger.info("operators between matrix products on %s in %s: %s", device, dtype, ops.name)
    return ops


def check_ops(
    ops: FusedOps, device: torch.device, dtype: torch.dtype, widths: tuple[int, int], *, quantizing: bool
) -> None:
    """Compare the operators that a model calls with the plain operators on random rows.

    Raises:
        AssertionError: The results differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return (2 * torch.randn(*size, dtype=torch.float32, generator=generator)).to(device, dtype)

    width, inner = widths
    x, residual, bias = random(_NUM_TRIED_ROWS, width), random(_NUM_TRIED_ROWS, width), random(width)
    norm = Norm(random(width), random(width), 1e-5)
    up, up_bias = random(_NUM_TRIED_ROWS, inner), random(inner)
    close = torch.testing.assert_close
    expected = PLAIN_OPS.add_norm(x, bias, residual, norm)
    if not quantizing:
        close(ops.bias_gelu(up, up_bias), PLAIN_OPS.bias_gelu(up, up_bias))
        close(ops.add_norm(x, bias, residual, norm), expected)
        return
    check_quantized(ops.quantize(x), PLAIN_OPS.quantize(x))
    # The model calls this operator with a float32 bias, and Triton compiles a kernel for each type.
    wide_bias = up_bias.float()
    check_quantized(ops.bias_gelu_quantize(up, wide_bias), PLAIN_OPS.bias_gelu_quantize(up, wide_bias))
    values, quantized = ops.add_norm_quantize(x, bias, residual, norm)
    close(values, expected)
    check_quantized(quantized, PLAIN_OPS.add_norm_quantize(x, bias, residual, norm)[1])


def check_quantized(ours: Quantized, theirs: Quantized) -> None:
    """Raise `AssertionError` if two quantizations of the same rows differ by more than rounding."""
    torch.testing.assert_close(ours.scales, theirs.scales)
    # Codes may differ by one step, since a value may lie between two codes. A step is at most an eighth of
    # the code, or 2**-9 for the smallest codes.
    torch.testing.assert_close(ours.codes.float(), theirs.codes.float(), rtol=1 / 8, atol=2**-9)


class FusedBlocks:
    """Layers in which the kernel after a matrix product also adds the bias.

    cuBLASLt can add the bias while it writes a product, but it cannot apply the exact GELU
    (`torch._addmm_activation` has the tanh approximation, which changes the scores). Another kernel has to
    read the product anyway, and can add the bias at no cost. Where a kernel of our own for the up projection
    is faster, it adds the bias and applies GELU before it writes the product. No kernel follows the products
    for queries, keys and values, so these products add the bias themselves.

    Args:
        ops: The operators after the products.
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
            inner = self._ops.linear_gelu(rows.values, up.weight, up.bias)
            return Rows(self._ops.add_norm(F.linear(inner, down.weight), down.bias, rows.values, norm))

        return run


def _check_capability(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _TRITON_CAPABILITY:
        raise RuntimeError(
            f"Triton needs compute capability 8.0, and {device} has {'.'.join(map(str, capability))}"
        )


def _copies_tiles(device: torch.device) -> bool:
    """Return whether the device loads and stores tiles of a matrix by itself."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _TILE_COPY_CAPABILITY


def _with_linear_gelu(
    ops: FusedOps, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]
) -> FusedOps:
    """Return the operators with a fused up projection, where that is right and faster."""
    from bge_rerank_integrations.engine.cuda.triton_kernels import linear_gelu

    separate = ops.linear_gelu
    least_rows = least_fused_rows(linear_gelu, separate, device, dtype, widths)
    if least_rows is None:
        return ops

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (linear_gelu if len(x) >= least_rows else separate)(x, weight, bias)

    name = f"{ops.name}, GELU in the up projection from {least_rows} rows on"
    return ops._replace(name=name, linear_gelu=run)


def _triton_ops() -> FusedOps:
    from bge_rerank_integrations.engine.cuda.triton_kernels import (
        TRITON,
        add_norm,
        add_norm_quantize,
        bias_gelu,
        bias_gelu_quantize,
        quantize,
    )

    return FusedOps(
        f"Triton {TRITON}",
        lambda x, weight, bias: bias_gelu(F.linear(x, weight), bias),
        bias_gelu,
        add_norm,
        quantize,
        bias_gelu_quantize,
        add_norm_quantize,
    )
