"""The cross-encoder in int8 on CPUs. It needs no calibration data.

Weights are quantized by output channel when the model is loaded, and activations by token when they are
computed. Matrix products run in oneDNN on processors with VNNI or AMX, else in `int16_products`. Norms, GELU,
the softmax and the residual stream are float32. The products of attention are bfloat16 on processors that
multiply pairs of them fast, else float32.

The layers are not built from `Blocks` as those of `PackedCrossEncoder` are. They change the residual stream
in place, and after attention they process it in blocks of rows, so that a block stays in the cache from one
matrix product to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.cpu.int8_attention import attend
from bge_rerank_integrations.engine.cpu.int8_kernels import add_norm_quantize, gelu_quantize, quantize
from bge_rerank_integrations.engine.cpu.int8_linear import Floats, Int8Linear
from bge_rerank_integrations.engine.linear import plain_linear
from bge_rerank_integrations.engine.packing import PackedBatch, Seqlens
from bge_rerank_integrations.engine.padded_rows import round_up_rows
from bge_rerank_integrations.engine.shape import EncoderShape
from bge_rerank_integrations.runtime.shutdown import raise_if_exiting

# Rows of one block. With more rows, a weight is read from memory fewer times. With fewer rows, the values
# between two products stay in the cache.
_BLOCK_ROWS = 256
# oneDNN keeps a kernel for each number of rows. In int8 a kernel takes half a megabyte, less than in float32,
# so twice as many sizes are affordable.
_ROWS_IN_OCTAVE = 16


class Int8CrossEncoder:
    """`PackedCrossEncoder` with int8 matrix products.

    Args:
        shape: The shape of the checkpoint.
        weights: Every tensor of `shape.parameter_shapes()`, the encoder's matrices and the classifier in
            float32. The model removes each tensor from the mapping, so that the mapping keeps no second copy.
    """

    def __init__(self, shape: EncoderShape, weights: MutableMapping[str, Tensor]) -> None:
        self._shape = shape
        self._words = weights.pop("roberta.embeddings.word_embeddings.weight")
        self._positions = weights.pop("roberta.embeddings.position_embeddings.weight").float()
        self._positions += weights.pop("roberta.embeddings.token_type_embeddings.weight")[0].float()
        self._norm = _Norm(weights, "roberta.embeddings.LayerNorm", shape.layer_norm_eps)
        names = [f"roberta.encoder.layer.{index}" for index in range(shape.num_layers)]
        self._layers = [_FullLayer(weights, name, shape) for name in names[:-1]]
        self._last_layer = _FirstTokenLayer(weights, names[-1], shape)
        self._dense, self._out_proj = (
            plain_linear(weights.pop(f"classifier.{name}.weight"), weights.pop(f"classifier.{name}.bias"))
            for name in ("dense", "out_proj")
        )

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the B logits, float32 [B]."""
        num_tokens = len(batch.ids)
        rows = _Rows(num_tokens, self._shape.hidden_size)
        x = rows.x[:num_tokens]
        torch.add(F.embedding(batch.ids, self._words), F.embedding(batch.positions, self._positions), out=x)
        x.copy_(F.layer_norm(x, x.shape[1:], *self._norm.tensors, self._norm.eps))
        rows.quantize()
        for layer in self._layers:
            raise_if_exiting()
            layer(rows, batch.seqlens)
        first = self._last_layer(rows, batch.seqlens)
        return self._out_proj(torch.tanh(self._dense(first))).squeeze(-1)


class _Codes:
    """Quantized rows: uint8 codes [rows, width], and the scale and low of each row, float32 [rows, 2]."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.tensor = torch.empty(num_rows, width, dtype=torch.uint8)
        self.array = self.tensor.numpy()
        self.affine = np.empty((num_rows, 2), np.float32)


class _Rows:
    """The residual stream in float32, and its quantized rows. Rows after `num_rows` are padding."""

    def __init__(self, num_rows: int, width: int) -> None:
        total = round_up_rows(num_rows, num_in_octave=_ROWS_IN_OCTAVE)
        self.x = torch.empty(total, width, dtype=torch.float32)
        self.x[num_rows:].zero_()
        self.array = self.x.numpy()
        self.codes = _Codes(total, width)

    def quantize(self) -> None:
        quantize(self.array, self.codes.array, self.codes.affine)

    def blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.x), _BLOCK_ROWS):
            yield slice(start, min(start + _BLOCK_ROWS, len(self.x)))

    def select(self, indices: Tensor) -> _Rows:
        """Return copies of the rows at `indices`."""
        selected = _Rows(len(indices), self.x.shape[1])
        selected.x[: len(indices)] = self.x[indices]
        selected.quantize()
        return selected


class _Norm:
    """Parameters of a LayerNorm."""

    def __init__(self, weights: MutableMapping[str, Tensor], name: str, eps: float) -> None:
        self.tensors = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias")
        self.weight, self.bias = (tensor.numpy() for tensor in self.tensors)
        self.eps = eps


class _FullLayer:
    """One encoder layer over all tokens. It changes the rows in place."""

    def __init__(self, weights: MutableMapping[str, Tensor], name: str, shape: EncoderShape) -> None:
        self._qkv = _fused(weights, name, "query", "key", "value")
        self._rest = _AfterAttention(weights, name, shape)
        self._num_heads = shape.num_heads

    def __call__(self, rows: _Rows, seqlens: Seqlens) -> None:
        qkv = _Projected(rows, self._qkv, seqlens)
        self._rest(rows, _attend(qkv, qkv, rows.x.shape, self._num_heads))


class _FirstTokenLayer:
    """The last encoder layer, for the first token of each sequence. The head reads nothing else."""

    def __init__(self, weights: MutableMapping[str, Tensor], name: str, shape: EncoderShape) -> None:
        self._q = _fused(weights, name, "query")
        self._kv = _fused(weights, name, "key", "value")
        self._rest = _AfterAttention(weights, name, shape)
        self._num_heads = shape.num_heads

    def __call__(self, rows: _Rows, seqlens: Seqlens) -> Tensor:
        first = rows.select(seqlens.cu_seqlens[:-1])
        q = _Projected(first, self._q, seqlens.first_tokens())
        kv = _Projected(rows, self._kv, seqlens)
        self._rest(first, _attend(q, kv, first.x.shape, self._num_heads))
        return first.x[: len(seqlens.lengths)]


class _Projected:
    """The product of rows with a weight, and everything that `attend` needs to restore its values."""

    def __init__(self, rows: _Rows, linear: Int8Linear, seqlens: Seqlens) -> None:
        self.product = linear.product(rows.codes.tensor)
        self.parts = (
            self.product,
            rows.codes.affine,
            linear.offset,
            linear.bias,
            seqlens.cu_seqlens.numpy(),
        )


def _attend(q: _Projected, kv: _Projected, shape: Sequence[int], num_heads: int) -> _Codes:
    """Attend from the queries, the first columns of `q`, to the keys and values, the last columns of `kv`."""
    result = _Codes(*shape)
    attended = np.zeros(shape, np.float32)
    k_column = kv.product.shape[1] - 2 * shape[1]
    attend(*q.parts, *kv.parts, k_column, num_heads, attended, result.array, result.affine)
    return result


class _AfterAttention:
    """The part of a layer after attention: projection, residual, norm, feed-forward, residual, norm."""

    def __init__(self, weights: MutableMapping[str, Tensor], name: str, shape: EncoderShape) -> None:
        self._out = _linear(weights, f"{name}.attention.output.dense")
        self._attention_norm = _Norm(weights, f"{name}.attention.output.LayerNorm", shape.layer_norm_eps)
        self._up = _linear(weights, f"{name}.intermediate.dense")
        self._down = _linear(weights, f"{name}.output.dense")
        self._output_norm = _Norm(weights, f"{name}.output.LayerNorm", shape.layer_norm_eps)

    def __call__(self, rows: _Rows, attended: _Codes) -> None:
        for block in rows.blocks():
            _add_norm(
                rows, block, attended.tensor[block], attended.affine[block], self._out, self._attention_norm
            )
            codes, affine = rows.codes.tensor[block], rows.codes.affine[block]
            up = self._up
            inner = _Codes(len(codes), len(up.bias))
            gelu_quantize(up.product(codes), affine, up.offset, up.bias, inner.array, inner.affine)
            _add_norm(rows, block, inner.tensor, inner.affine, self._down, self._output_norm)


def _add_norm(
    rows: _Rows, block: slice, codes: Tensor, affine: Floats, linear: Int8Linear, norm: _Norm
) -> None:
    """Multiply codes with a weight, add the product to a block of rows, normalize and quantize the block."""
    add_norm_quantize(
        linear.product(codes),
        affine,
        linear.offset,
        linear.bias,
        rows.array[block],
        norm.weight,
        norm.bias,
        norm.eps,
        rows.codes.array[block],
        rows.codes.affine[block],
    )


def _linear(weights: MutableMapping[str, Tensor], name: str) -> Int8Linear:
    return Int8Linear(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias"))


def _fused(weights: MutableMapping[str, Tensor], layer: str, *parts: str) -> Int8Linear:
    names = [f"{layer}.attention.self.{part}" for part in parts]
    return Int8Linear(
        torch.cat([weights.pop(f"{name}.weight") for name in names]),
        torch.cat([weights.pop(f"{name}.bias") for name in names]),
    )
