"""The parts of an encoder layer, and the protocol that every implementation of them follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.linear import LinearFactory


class Parameters(NamedTuple):
    """Parameters of a linear layer: weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """Parameters of a LayerNorm: weight [width], bias [width], and `eps`, which is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class Quantized(NamedTuple):
    """Quantized rows. `codes * scales` restores the values.

    Attributes:
        codes: [rows, width] in the quantized type.
        scales: float32 [rows, 1], the scale of each row.
    """

    codes: Tensor
    scales: Tensor


class Rows(NamedTuple):
    """The residual stream, with quantized rows where matrix products read those instead.

    Attributes:
        values: The rows [rows, width].
        quantized: The quantized rows, without the bias of the norm that computed them.
    """

    values: Tensor
    quantized: Quantized | None = None

    def select(self, indices: Tensor) -> Rows:
        """Return copies of the rows at `indices`."""
        if self.quantized is None:
            return Rows(self.values[indices])
        codes, scales = self.quantized
        # Index the codes as bytes: some releases of torch cannot index float8 types.
        chosen = codes.view(torch.uint8)[indices].view(codes.dtype)
        return Rows(self.values[indices], Quantized(chosen, scales[indices]))


class Blocks(Protocol):
    """Builds the parts of a layer. A part may store its parameters in its own layout."""

    def embed(self, token_type: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Rows]:
        """Return a function that adds word, position and token type embeddings, and normalizes the sum."""

    def project(self, linear: Parameters, before: Norm) -> Callable[[Rows], Tensor]:
        """Return a projection to queries, keys or values, for rows that the norm `before` computed."""

    def attention_output(self, linear: Parameters, norm: Norm) -> Callable[[Tensor, Rows], Rows]:
        """Return a function that projects attention outputs, adds the residual, and normalizes the sum."""

    def feed_forward(
        self, up: Parameters, down: Parameters, before: Norm, norm: Norm
    ) -> Callable[[Rows], Rows]:
        """Return the feed-forward part (product, GELU, product, residual, norm) for rows from `before`."""


class PlainBlocks:
    """Layers of torch's own operators, with a choice of how linear layers run.

    Args:
        linear: Makes a linear layer from its weight and bias.
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
