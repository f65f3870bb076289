"""The XLM-RoBERTa cross-encoder over packed sequences.

Sequences are not padded. The last layer computes only the first token of each sequence, which the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.attention import VarlenAttention
from bge_rerank_integrations.engine.blocks import Blocks, Norm, Parameters, PlainBlocks, Rows
from bge_rerank_integrations.engine.linear import plain_linear
from bge_rerank_integrations.engine.packing import PackedBatch, Seqlens
from bge_rerank_integrations.engine.shape import EncoderShape
from bge_rerank_integrations.runtime.shutdown import raise_if_exiting


class PackedCrossEncoder:
    """`XLMRobertaForSequenceClassification` with one label, for inference.

    Args:
        shape: The shape of the checkpoint.
        weights: Every tensor of `shape.parameter_shapes()` on the model's device, the classifier's in
            float32. The model removes each tensor from the mapping, so that the mapping keeps no second copy.
        attention: The attention implementation.
        blocks: Makes the parts of the encoder's layers; None for torch's own operators.
        row_multiple: Inputs of the layers are padded to a multiple of this number of rows.
    """

    def __init__(
        self,
        shape: EncoderShape,
        weights: MutableMapping[str, Tensor],
        *,
        attention: VarlenAttention,
        blocks: Blocks | None = None,
        row_multiple: int = 1,
    ) -> None:
        take = _Taker(weights, shape, blocks or PlainBlocks(plain_linear))
        self._words = weights.pop("roberta.embeddings.word_embeddings.weight")
        # Every token has the same token type.
        self._positions = weights.pop("roberta.embeddings.position_embeddings.weight")
        token_type = weights.pop("roberta.embeddings.token_type_embeddings.weight")[0]
        norm = take.norm("roberta.embeddings.LayerNorm")
        self._embed = take.blocks.embed(token_type, norm)
        names = [f"roberta.encoder.layer.{index}" for index in range(shape.num_layers)]
        self._layers: list[_FullLayer] = []
        for name in names[:-1]:
            self._layers.append(_FullLayer(take, name, norm, attention))
            norm = self._layers[-1].norm
        self._last_layer = _FirstTokenLayer(take, names[-1], norm, attention, row_multiple)
        # The head computes only B rows, so the exact float32 costs almost nothing.
        self._dense = plain_linear(*take.parameters("classifier.dense"))
        self._out_proj = plain_linear(*take.parameters("classifier.out_proj"))

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the B logits, float32 [B], on the device."""
        words, positions = F.embedding(batch.ids, self._words), F.embedding(batch.positions, self._positions)
        x = self._embed(words, positions)
        for layer in self._layers:
            raise_if_exiting()
            x = layer(x, batch.seqlens)
        first = self._last_layer(x, batch.seqlens).values[: len(batch.seqlens.lengths)]
        return self._out_proj(torch.tanh(self._dense(first.float()))).squeeze(-1)


class _FullLayer:
    """One encoder layer over all tokens.

    Attributes:
        norm: The last norm of the layer.
    """

    def __init__(self, take: _Taker, name: str, before: Norm, attention: VarlenAttention) -> None:
        self._qkv = take.projection(name, before, "query", "key", "value")
        self._rest = _AfterAttention(take, name)
        self.norm: Norm = self._rest.norm
        self._attention = attention
        self._num_heads = take.shape.num_heads

    def __call__(self, x: Rows, seqlens: Seqlens) -> Rows:
        q, k, v = self._qkv(x).unflatten(-1, (3, self._num_heads, -1)).unbind(1)
        return self._rest(x, self._attention(q, k, v, seqlens, seqlens))


class _FirstTokenLayer:
    """The last encoder layer, for the first token of each of B sequences. The head reads nothing else.

    Keys and values are computed for all tokens. Queries, and everything after attention, are computed for B
    rows, padded to a multiple of the rows that the linear layers need. The padding repeats the first row.
    """

    def __init__(
        self,
        take: _Taker,
        name: str,
        before: Norm,
        attention: VarlenAttention,
        row_multiple: int,
    ) -> None:
        self._q = take.projection(name, before, "query")
        self._kv = take.projection(name, before, "key", "value")
        self._rest = _AfterAttention(take, name)
        self._attention = attention
        self._num_heads = take.shape.num_heads
        self._row_multiple = row_multiple

    def __call__(self, x: Rows, seqlens: Seqlens) -> Rows:
        starts = seqlens.cu_seqlens[:-1]
        num_missing = -len(starts) % self._row_multiple
        first = x.select(F.pad(starts, (0, num_missing)) if num_missing else starts)
        q = self._q(first).unflatten(-1, (self._num_heads, -1))
        k, v = self._kv(x).unflatten(-1, (2, self._num_heads, -1)).unbind(1)
        return self._rest(first, self._attention(q, k, v, seqlens.first_tokens(), seqlens))


class _AfterAttention:
    """The part of a layer after attention: projection, residual, norm, feed-forward, residual, norm."""

    def __init__(self, take: _Taker, name: str) -> None:
        blocks = take.blocks
        between = take.norm(f"{name}.attention.output.LayerNorm")
        self.norm: Norm = take.norm(f"{name}.output.LayerNorm")
        self._attention_output = blocks.attention_output(
            take.parameters(f"{name}.attention.output.dense"), between
        )
        up, down = (take.parameters(f"{name}.{part}.dense") for part in ("intermediate", "output"))
        self._feed_forward = blocks.feed_forward(up, down, between, self.norm)

    def __call__(self, residual: Rows, attended: Tensor) -> Rows:
        return self._feed_forward(self._attention_output(attended.flatten(-2), residual))


class _Taker:
    """Removes parameters from a mapping of weights and returns them."""

    def __init__(self, weights: MutableMapping[str, Tensor], shape: EncoderShape, blocks: Blocks) -> None:
        self.shape = shape
        self.blocks = blocks
        self._weights = weights

    def parameters(self, name: str) -> Parameters:
        return Parameters(self._weights.pop(f"{name}.weight"), self._weights.pop(f"{name}.bias"))

    def projection(self, layer: str, before: Norm, *parts: str) -> Callable[[Rows], Tensor]:
        pairs = [self.parameters(f"{layer}.attention.self.{part}") for part in parts]
        weights, biases = zip(*pairs, strict=True)
        return self.blocks.project(Parameters(torch.cat(weights), torch.cat(biases)), before)

    def norm(self, name: str) -> Norm:
        return Norm(*self.parameters(name), self.shape.layer_norm_eps)
