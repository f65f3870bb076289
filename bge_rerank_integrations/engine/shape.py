"""The shape of a checkpoint, and the tensors that a checkpoint of this shape contains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The settings in a checkpoint's config.json that define the model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    padding_idx: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens. The first `padding_idx + 1` position ids are not used."""
        return self.max_position_embeddings - self.padding_idx - 1

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that a checkpoint of this shape must contain."""
        width, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "roberta.embeddings.word_embeddings.weight": (self.vocab_size, width),
            "roberta.embeddings.position_embeddings.weight": (self.max_position_embeddings, width),
            "roberta.embeddings.token_type_embeddings.weight": (self.type_vocab_size, width),
            **_norm_shapes("roberta.embeddings.LayerNorm", width),
            **_linear_shapes("classifier.dense", width, width),
            **_linear_shapes("classifier.out_proj", 1, width),
        }
        for index in range(self.num_layers):
            layer = f"roberta.encoder.layer.{index}"
            for part in ("query", "key", "value"):
                shapes |= _linear_shapes(f"{layer}.attention.self.{part}", width, width)
            shapes |= _linear_shapes(f"{layer}.attention.output.dense", width, width)
            shapes |= _norm_shapes(f"{layer}.attention.output.LayerNorm", width)
            shapes |= _linear_shapes(f"{layer}.intermediate.dense", inner, width)
            shapes |= _linear_shapes(f"{layer}.output.dense", width, inner)
            shapes |= _norm_shapes(f"{layer}.output.LayerNorm", width)
        return shapes


def _linear_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
