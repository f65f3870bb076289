"""The embedded model before training: the original's layers, or some of them, as an XLM-RoBERTa model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import XLMRobertaForSequenceClassification

from training import original
from training.original import BOS, EOS, Ids, config

# Special tokens of XLM-RoBERTa in the order of their ids, and their names in the original's tokenizer.
CONTROL = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}


class Vocabulary:
    """The original's vocabulary with new ids, without its reserved and unused tokens.

    Args:
        tokenizer: The parsed tokenizer.json of the original.

    Attributes:
        kept: The original's id for each new id, int64 [vocab_size].
    """

    def __init__(self, tokenizer: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[str, int] = tokenizer["model"]["vocab"]
        control = [self._pieces[piece] for piece in CONTROL.values()]
        others = [
            number
            for piece, number in self._pieces.items()
            if number not in control and not piece.startswith("[unused")
        ]
        self.kept = np.asarray([*control, *others])
        self._new_ids = np.full(original.VOCAB_SIZE, list(CONTROL).index("<unk>"), np.int32)
        self._new_ids[self.kept] = np.arange(len(self.kept), dtype=np.int32)

    def remap(self, ids: Ids) -> Ids:
        """Map the original's ids to the new ids."""
        remapped: Ids = self._new_ids[ids]
        return remapped

    def to_tokenizer(self) -> dict[str, Any]:
        """Return the parsed tokenizer.json of the new model."""
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


def create(
    bert: dict[str, Tensor], vocabulary: Vocabulary, layers: Sequence[int]
) -> XLMRobertaForSequenceClassification:
    """Create an untrained student from some layers of the original, whose weights have BERT's names."""
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
    """Return a copy of a model with only the given layers."""
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
    """Write a checkpoint with float32 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tokenizer = json.dumps(vocabulary.to_tokenizer(), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
