"""Scoring with a converted model, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.common import MAX_LENGTH, Pairs
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, IdBatch, batch_sizes
from bge_rerank_integrations.engine.cpu.cores import usable_cores

INPUTS = ("input_ids", "attention_mask")
_DEFAULT_BATCH_SIZE = 8


class GraphScorer:
    """Scores pairs in batches that are sorted by length and padded to their longest pair.

    Args:
        setup: The setup with the tokenizer and the padding id.
        infer: Takes int64 ids and mask, each [pairs, tokens], and returns logits [pairs].
    """

    def __init__(self, setup: Setup, infer: Callable[[IdBatch, IdBatch], Any]) -> None:
        self._encode = PairEncoder(setup)
        self._infer = infer
        self._record: Callable[[IdBatch], None] | None = None

    def __call__(self, pairs: Pairs, batch_size: int | None) -> list[float]:
        """Return the logits in the order of the pairs."""
        sequences = self._encode(pairs)
        order = sorted(range(len(pairs)), key=lambda row: -len(sequences[row]))
        logits = np.empty(len(pairs))
        size = batch_size or _DEFAULT_BATCH_SIZE
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            ids, mask = self._encode.pad([sequences[row] for row in rows])
            if self._record is not None:
                self._record(ids)
            logits[rows] = self._infer(ids, mask)
        return [float(logit) for logit in logits]

    @contextmanager
    def watch(self, record: Callable[[IdBatch], None]) -> Iterator[None]:
        """Call a function with each batch of ids within this context."""
        self._record = record
        try:
            yield
        finally:
            self._record = None


def graph_contender(
    name: str, dtype: str, setup: Setup, infer: Callable[[IdBatch, IdBatch], Any]
) -> Contender:
    """Return a contender that scores with a `GraphScorer`."""
    scorer = GraphScorer(setup, infer)
    return Contender(
        name=name,
        dtype=dtype,
        run=scorer,
        watch=scorer.watch,
        batch_sizes=batch_sizes(setup),
        batch_size=_DEFAULT_BATCH_SIZE,
    )


class PairEncoder:
    """Turns texts into padded ids with the model's `tokenizer.json`, using all threads."""

    def __init__(self, setup: Setup) -> None:
        self._tokenizer = Tokenizer.from_file(str(setup.tokenizer_path))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_LENGTH)
        self._padding_idx = setup.shape().padding_idx

    def __call__(self, pairs: Pairs) -> list[list[int]]:
        """Return the ids of each pair, cut to `MAX_LENGTH` tokens."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(pairs)]

    def pad(self, sequences: list[list[int]]) -> tuple[IdBatch, IdBatch]:
        """Return the int64 ids and mask of a batch, each [pairs, tokens]."""
        ids = np.full((len(sequences), max(map(len, sequences))), self._padding_idx, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return ids, mask


def calibration(setup: Setup) -> list[dict[str, IdBatch]]:
    """Return the pairs of the setup's sample, one pair per batch."""
    encode = PairEncoder(setup)
    return [dict(zip(INPUTS, encode.pad([ids]), strict=True)) for ids in encode(setup.sample)]


def traceable(folder: Path, attention: str) -> tuple[Any, dict[str, Any]]:
    """Return a module that maps ids and mask to logits, and example inputs for tracing it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, attn_implementation=attention, dtype=torch.float32
            )

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]

    module = Logits().eval()
    padding_idx = module.model.config.pad_token_id
    ids = torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 2, padding_idx, padding_idx, padding_idx]])
    return module, dict(zip(INPUTS, (ids, (ids != padding_idx).long()), strict=True))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return usable_cores().num_cores
