"""What an encoder layer is made of, matrix products and what lies around them, behind one set of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.linear import LinearFactory


class Parameters(NamedTuple):
    """Of a linear layer: weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """Of a LayerNorm: weight and bias [width], and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class Quantized(NamedTuple):
    """Rows in few bits.

    Attributes:
        codes: [rows, width] in the narrow type.
        scales: float32 [rows, 1], what each row is to be multiplied by.
    """

    codes: Tensor
    scales: Tensor


class Rows(NamedTuple):
    """The residual stream, [rows, width], and beside it what products may read in its place.

    Attributes:
        values: The rows.
        quantized: The rows less the bias of the norm that made them.
    """

    values: Tensor
    quantized: Quantized | None = None

    def select(self, indices: Tensor) -> Rows:
        """Return copies of some rows."""
        if self.quantized is None:
            return Rows(self.values[indices])
        codes, scales = self.quantized
        # As bytes: not every torch can index the narrow types.
        chosen = codes.view(torch.uint8)[indices].view(codes.dtype)
        return Rows(self.values[indices], Quantized(chosen, scales[indices]))


class Blocks(Protocol):
    """Makes the parts of a layer from their parameters, which a part may keep in a layout of its own."""

    def embed(self, token_type: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Rows]:
        """Make the norm over the sum of words' and positions' embeddings and the token type's."""

    def project(self, linear: Parameters, before: Norm) -> Callable[[Rows], Tensor]:
        """Make a projection to what attention reads, of rows that a norm made."""

    def attention_output(self, linear: Parameters, norm: Norm) -> Callable[[Tensor, Rows], Rows]:
        """Make what follows attention: of attended rows and the residual, projection, sum and norm."""

    def feed_forward(
        self, up: Parameters, down: Parameters, before: Norm, norm: Norm
    ) -> Callable[[Rows], Rows]:
        """Make the feed-forward part: of rows that a norm made, two products with a GELU, sum and norm."""


class PlainBlocks:
    """Torch's own operators around a way to run linear layers.

    Args:
        linear: The way.
    """

    def __init__(self, linear: LinearFactory) -> None:
        self._linear = linear

    def embed(self, token_type: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Rows]:
        """See `Blocks`."""
        return lambda words, positions: Rows(_layer_norm(words + token_type + positions, norm))

    def project(self, linear: Parameters, before: Norm) -> Callable[[Rows], Tensor]:  # noqa: ARG002
        """See `Blocks`."""
        run = self._linear(*linear)
        return lambda rows: run(rows.values)

    def attention_output(self, linear: Parameters, norm: Norm) -> Callable[[Tensor, Rows], Rows]:
        """See `Blocks`."""
        run = self._linear(*linear)
        return lambda attended, residual: Rows(_layer_norm(run(attended) + residual.values, norm))

    def feed_forward(
        self,
        up: Parameters,
        down: Parameters,
        before: Norm,  # noqa: ARG002
        norm: Norm,
    ) -> Callable[[Rows], Rows]:
        """See `Blocks`."""
        run_up, run_down = self._linear(*up), self._linear(*down)

        def run(rows: Rows) -> Rows:
            return Rows(_layer_norm(run_down(F.gelu(run_up(rows.values))) + rows.values, norm))

        return run


def _layer_norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
