"""The original model, ms-marco-MiniLM-L-12-v2, read from its int8 ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

Ids = npt.NDArray[np.int32]

VOCAB_SIZE = 30522
CLS, SEP = 101, 102
BOS, PAD, EOS = 0, 1, 2
FIRST_POSITION = PAD + 1
"""The first position id of XLM-RoBERTa."""
NUM_LAYERS = 12
MAX_LENGTH = 512

_ZERO_POINT, _SCALE, _QUANTIZED = "_zero_point", "_scale", "_quantized"


def read_weights(model: Path) -> dict[str, Tensor]:
    """Read the weights of the ONNX file as float32, under the names of BERT in transformers."""
    # Imported here, so that the rest of the module works without onnx.
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
        """Follow first inputs back from a tensor to its integer product, and return the weight's name."""
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
            # ONNX stores the transposed matrix.
            weights[biases[0].removesuffix("bias") + "weight"] = dequantized(products[0]).T.contiguous()
    return weights


def to_xlm_roberta(bert: dict[str, Tensor], *, words: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    """Convert BERT's weights to the XLM-RoBERTa architecture.

    XLM-RoBERTa has only one token type, and its positions start at 2.

    Args:
        bert: Weights under BERT's names.
        words: Word embeddings of the new model, [vocab_size, hidden_size].
        layers: Layers of BERT to keep, in their new order.
    """
    types = bert["bert.embeddings.token_type_embeddings.weight"]
    positions = bert["bert.embeddings.position_embeddings.weight"]
    weights = {
        "roberta.embeddings.word_embeddings.weight": words,
        "roberta.embeddings.position_embeddings.weight": torch.cat((positions[:FIRST_POSITION], positions)),
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


def config(*, vocab_size: int, num_layers: int) -> XLMRobertaConfig:
    """Return the transformers configuration of a model with the original's dimensions."""
    return XLMRobertaConfig(
        architectures=["XLMRobertaForSequenceClassification"],
        id2label={0: "relevance"},
        label2id={"relevance": 0},
        vocab_size=vocab_size,
        hidden_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=MAX_LENGTH + FIRST_POSITION,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        # Distillation is regression on a deterministic teacher's outputs, so dropout would only add noise.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class Original:
    """The original in float32. It returns the logits and hidden states that a student imitates.

    It runs as an XLM-RoBERTa model with twice the vocabulary. The first half of the word embeddings includes
    BERT's first token type, and the second half includes the second one. Passages use the ids of the second
    half. This gives exactly BERT's embeddings.

    Args:
        bert: Weights under BERT's names.
        num_layers: Number of layers in `bert`.
    """

    def __init__(self, bert: dict[str, Tensor], num_layers: int = NUM_LAYERS) -> None:
        words = bert["bert.embeddings.word_embeddings.weight"]
        types = bert["bert.embeddings.token_type_embeddings.weight"]
        weights = to_xlm_roberta(
            bert, words=torch.cat([words + row for row in types]), layers=range(num_layers)
        )
        weights["roberta.embeddings.token_type_embeddings.weight"].zero_()
        self._model: XLMRobertaForSequenceClassification = XLMRobertaForSequenceClassification(
            config(vocab_size=len(types) * VOCAB_SIZE, num_layers=num_layers)
        )
        self._model.load_state_dict(weights)
        self._model.train(False)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[Ids, Ids]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Score pairs of ids as `[CLS] query [SEP] passage [SEP]`.

        Args:
            pairs: The ids of each query and passage, without special tokens.

        Returns:
            The logits [B], and the hidden states [B, T, hidden_size] after the embeddings and each layer.
        """
        sequences = [
            np.concatenate([[CLS], query, [SEP], passage + VOCAB_SIZE, [SEP + VOCAB_SIZE]])
            for query, passage in pairs
        ]
        ids, mask = pad(sequences, padding=0)
        # Positions are passed explicitly. XLM-RoBERTa would skip ids that equal its own padding id.
        positions = torch.arange(ids.shape[1]).expand_as(ids) + FIRST_POSITION
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
        )
        return output.logits[:, 0], output.hidden_states


def pad(sequences: Sequence[Ids], *, padding: int) -> tuple[Tensor, Tensor]:
    """Return padded ids and their mask, each int64 [B, T]."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), padding, np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def load_tokenizer(folder: Path) -> Callable[[str], Ids]:
    """Return a function that turns a text into the original's ids, without special tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokenize(text: str) -> Ids:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    return tokenize
