"""The embedded model before training: the original in the XLM-RoBERTa architecture, whole or in part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from training import original
from training.original import Ids

# Ids as XLM-RoBERTa has them, and the names of the pieces in the original's tokenizer.
CONTROL = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
BOS, PAD, EOS = 0, 1, 2


class Vocabulary:
    """Which of the original's pieces are kept, and under which ids.

    Args:
        tokenizer: The original's tokenizer.json, parsed.
        frequencies: How often each of the original's ids occurs in English text; those that occur least
            are left out first. Single characters always stay, so that any word can still be spelled.
        size: How many pieces to keep; None keeps all but those that are reserved in the original.

    Attributes:
        kept: int64 [size], the original's id of each new id.
    """

    def __init__(
        self, tokenizer: dict[str, Any], frequencies: Sequence[int], size: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[str, int] = tokenizer["model"]["vocab"]
        control = [self._pieces[piece] for piece in CONTROL.values()]
        others = [
            number
            for piece, number in self._pieces.items()
            if number not in control and not piece.startswith("[unused")
        ]
        if size is not None:
            spelling = {self._pieces[p] for p in self._pieces if len(p.removeprefix("##")) == 1}
            others.sort(key=lambda number: (number not in spelling, -frequencies[number], number))
            others = sorted(others[: size - len(control)])
        self.kept = np.asarray([*control, *others])

    def remap(self, ids: Ids) -> Ids:
        """Turn the original's ids into the new ones; only for a vocabulary that keeps all pieces."""
        table = np.full(original.VOCAB_SIZE, list(CONTROL).index("<unk>"), np.int32)
        table[self.kept] = np.arange(len(self.kept), dtype=np.int32)
        remapped: Ids = table[ids]
        return remapped

    def to_tokenizer(self) -> dict[str, Any]:
        """Return the tokenizer.json of the new model."""
        pieces = {number: piece for piece, number in self._pieces.items()}
        names = [*CONTROL, *(pieces[number] for number in self.kept[len(CONTROL) :])]
        added = [
            {
                "id": number,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, name in enumerate(CONTROL)
        ]
        special = {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for name, number in (("<s>", BOS), ("</s>", EOS))
        }

        def template(*parts: str) -> list[dict[str, dict[str, Any]]]:
            kinds = {"A": "Sequence", "B": "Sequence"}
            return [{kinds.get(part, "SpecialToken"): {"id": part, "type_id": 0}} for part in parts]

        return {
            **self._tokenizer,
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": template("<s>", "A", "</s>"),
                "pair": template("<s>", "A", "</s>", "</s>", "B", "</s>"),
                "special_tokens": special,
            },
            "model": {
                **self._tokenizer["model"],
                "unk_token": "<unk>",
                "vocab": {name: number for number, name in enumerate(names)},
            },
        }


def config(*, vocab_size: int, num_layers: int) -> XLMRobertaConfig:
    """Return the configuration, in transformers' terms."""
    shape = original.shape(vocab_size=vocab_size, num_layers=num_layers, padding_idx=PAD)
    found = XLMRobertaConfig(
        architectures=["XLMRobertaForSequenceClassification"],
        id2label={0: "relevance"},
        label2id={"relevance": 0},
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        type_vocab_size=1,
        layer_norm_eps=shape.layer_norm_eps,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        # Distilling is regression on what a deterministic teacher says: noise only blurs it.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    found._attn_implementation = "eager"  # the fused kernel's backward pass is slow on a CPU
    return found


def create(
    folder: Path, vocabulary: Vocabulary, layers: Sequence[int]
) -> XLMRobertaForSequenceClassification:
    """Make an untrained student of some of the original's layers; `folder` is the original's."""
    bert = original.read_weights(folder / "model.onnx")
    words = bert["bert.embeddings.word_embeddings.weight"][torch.from_numpy(vocabulary.kept)]
    weights = original.to_xlm_roberta(bert, words=words, layers=layers)
    model: XLMRobertaForSequenceClassification = XLMRobertaForSequenceClassification(
        config(vocab_size=len(vocabulary.kept), num_layers=len(layers))
    )
    model.load_state_dict(weights)
    model.train(False)
    return model


def keep_layers(
    model: XLMRobertaForSequenceClassification, layers: Sequence[int]
) -> XLMRobertaForSequenceClassification:
    """Return a copy that has only some of the layers."""
    weights = {}
    for name, tensor in model.state_dict().items():
        before, layer, after = name.partition(".layer.")
        if not layer:
            weights[name] = tensor
            continue
        number, _, rest = after.partition(".")
        if int(number) in layers:
            weights[f"{before}.layer.{layers.index(int(number))}.{rest}"] = tensor
    shorter: XLMRobertaForSequenceClassification = XLMRobertaForSequenceClassification(
        config(vocab_size=model.config.vocab_size, num_layers=len(layers))
    )
    shorter.load_state_dict(weights)
    shorter.train(False)
    return shorter


def save(model: XLMRobertaForSequenceClassification, vocabulary: Vocabulary, folder: Path) -> None:
    """Write a checkpoint in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tokenizer = json.dumps(vocabulary.to_tokenizer(), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
