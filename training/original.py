"""The original model, ms-marco-MiniLM-L-12-v2, out of its int8 ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.linear import resolve_linear
from bge_rerank_integrations.engine.model import EncoderShape, PackedCrossEncoder
from bge_rerank_integrations.engine.runner import Runner

Ids = npt.NDArray[np.int32]

VOCAB_SIZE = 30522
CLS, SEP = 101, 102
NUM_LAYERS = 12
MAX_LENGTH = 512

_ZERO_POINT, _SCALE, _QUANTIZED = "_zero_point", "_scale", "_quantized"


def read_weights(model: Path) -> dict[str, Tensor]:
    """Dequantize the ONNX file's weights to float32, under the names that BERT has in transformers."""
    # Here alone, so that the rest can be imported and tested without it.
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(model)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def dequantized(name: str) -> Tensor:
        zero_point = constants[name + _ZERO_POINT].astype(np.int32)
        values = constants[name + _QUANTIZED].astype(np.int32) - zero_point
        return torch.from_numpy(values * constants[name + _SCALE]).float()

    def product_before(name: str) -> str | None:
        """Follow the first inputs back from a tensor to the integer product that it was scaled from."""
        while name in producers and producers[name].op_type in ("Cast", "Mul", "MatMulInteger"):
            node = producers[name]
            if node.op_type == "MatMulInteger":
                return str(node.input[1]).removesuffix(_QUANTIZED)
            name = node.input[0]
        return None

    weights = {
        name: torch.from_numpy(array.copy())
        for name, array in constants.items()
        if name.endswith((".weight", ".bias"))
    }
    for name in list(constants):
        if name.endswith(".weight" + _QUANTIZED):
            weights[name.removesuffix(_QUANTIZED)] = dequantized(name.removesuffix(_QUANTIZED))
    for node in graph.node:
        biases = [name for name in node.input if name.endswith(".bias")]
        products = [product for name in node.input if (product := product_before(name))]
        if node.op_type == "Add" and biases and products:
            # ONNX multiplies from the other side
            weights[biases[0].removesuffix("bias") + "weight"] = dequantized(products[0]).T.contiguous()
    return weights


def to_xlm_roberta(bert: dict[str, Tensor], *, words: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    """Move BERT's weights into the XLM-RoBERTa architecture, which has one token type and a wider gap.

    Args:
        bert: Weights under BERT's names.
        words: The word embeddings to have, [vocab_size, hidden_size].
        layers: Which of BERT's layers to keep, in their new order.
    """
    types = bert["bert.embeddings.token_type_embeddings.weight"]
    positions = bert["bert.embeddings.position_embeddings.weight"]
    weights = {
        "roberta.embeddings.word_embeddings.weight": words,
        # XLM-RoBERTa counts positions from padding_idx + 1 = 2.
        "roberta.embeddings.position_embeddings.weight": torch.cat((positions[:2], positions)),
        "roberta.embeddings.token_type_embeddings.weight": types.mean(0, keepdim=True),
    }
    renamed = {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
    renamed["bert.embeddings.LayerNorm"] = "roberta.embeddings.LayerNorm"
    for new, old in enumerate(layers):
        prefix = f"bert.encoder.layer.{old}."
        for name in bert:
            if name.startswith(prefix):
                module = name.rpartition(".")[0]
                renamed[module] = f"roberta.encoder.layer.{new}.{module.removeprefix(prefix)}"
    for old_name, new_name in renamed.items():
        for kind in ("weight", "bias"):
            weights[f"{new_name}.{kind}"] = bert[f"{old_name}.{kind}"]
    return {name: tensor.clone() for name, tensor in weights.items()}


def shape(*, vocab_size: int, num_layers: int, padding_idx: int) -> EncoderShape:
    """Return the shape of the original, or of a model made from it."""
    return EncoderShape(
        vocab_size=vocab_size,
        hidden_size=384,
        num_layers=num_layers,
        num_heads=12,
        intermediate_size=1536,
        max_position_embeddings=MAX_LENGTH + padding_idx + 1,
        type_vocab_size=1,
        padding_idx=padding_idx,
        layer_norm_eps=1e-12,
    )


class Original:
    """Scores with the original's own weights, through this package's engine.

    BERT is an XLM-RoBERTa whose passages are written in a second vocabulary: a table of words plus the
    first token type, followed by one of words plus the second, gives exactly its embeddings. Positions
    are counted from 0.

    Args:
        bert: Weights under BERT's names.
        dtype: Precision of the arithmetic.
        num_layers: How many layers there are.
    """

    def __init__(self, bert: dict[str, Tensor], dtype: torch.dtype, num_layers: int = NUM_LAYERS) -> None:
        words = bert["bert.embeddings.word_embeddings.weight"]
        types = bert["bert.embeddings.token_type_embeddings.weight"]
        weights = to_xlm_roberta(
            bert, words=torch.cat([words + row for row in types]), layers=range(num_layers)
        )
        weights["roberta.embeddings.position_embeddings.weight"] = bert[
            "bert.embeddings.position_embeddings.weight"
        ]
        weights["roberta.embeddings.token_type_embeddings.weight"].zero_()
        weights = {
            name: tensor if name.startswith("classifier.") else tensor.to(dtype)
            for name, tensor in weights.items()
        }
        device = torch.device("cpu")
        dimensions = shape(vocab_size=len(types) * VOCAB_SIZE, num_layers=num_layers, padding_idx=-1)
        forward = PackedCrossEncoder(
            dimensions,
            weights,
            linear=resolve_linear(device, dtype).make,
            attention=resolve_attention(device, dtype, dimensions.head_dim),
        )
        self._runner = Runner(forward, device=device, padding_idx=-1, max_batch_tokens=2048)

    def __call__(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Return the logits of pairs of ids, each without control tokens; any number in one batch."""
        sequences = []
        for query, passage in pairs:
            passage = passage[: MAX_LENGTH - 3 - len(query)]
            second = np.concatenate([passage, [SEP]]).astype(np.int32) + VOCAB_SIZE
            sequences.append(np.concatenate([[CLS], query, [SEP], second]).astype(np.int32))
        return self._runner.run(sequences)


def load_tokenizer(folder: Path) -> Callable[[str], Ids]:
    """Return a function from text to the original's ids, without control tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokenize(text: str) -> Ids:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    return tokenize
