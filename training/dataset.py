"""The training set: pairs as ids, each with the original's logit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from training import sources
from training.original import Ids, Original, load_tokenizer, read_weights
from training.pairs import make_groups
from training.texts import documents

# Of each kind of document; package descriptions are the most various.
_NUM_QUERIES = {"descriptions": 4500, "articles": 2500, "docstrings": 1500}
_NUM_AT_ONCE = 700
_SEED = 20261124


@dataclass(frozen=True)
class Labels:
    """Pairs of ids without control tokens, and what the original makes of them.

    Attributes:
        queries: The ids of each pair's query.
        passages: The ids of each pair's passage.
        groups: int32 [pairs], the same number for pairs of one query; neighbours.
        logits: float32 [pairs].
    """

    queries: list[Ids]
    passages: list[Ids]
    groups: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write one .npz file."""
        np.savez(
            path,
            queries=np.concatenate(self.queries),
            query_lengths=[len(ids) for ids in self.queries],
            passages=np.concatenate(self.passages),
            passage_lengths=[len(ids) for ids in self.passages],
            groups=self.groups,
            logits=self.logits,
        )


def load(path: Path) -> Labels:
    """Read what `Labels.save` wrote."""
    data = np.load(path)
    return Labels(
        _split(data["queries"], data["query_lengths"]),
        _split(data["passages"], data["passage_lengths"]),
        data["groups"],
        data["logits"],
    )


def make(cache: Path) -> Labels:
    """Make pairs from the pinned sources and score them with the original in bfloat16."""
    folder = sources.fetch_model(cache)
    tokenize = load_tokenizer(folder)
    queries: list[Ids] = []
    passages: list[Ids] = []
    groups: list[int] = []
    for seed, (source, found) in enumerate(documents(cache).items(), start=_SEED):
        for group in make_groups(found, _NUM_QUERIES[source], seed=seed):
            query = tokenize(group.query)[:64]
            number = groups[-1] + 1 if groups else 0
            for passage in group.passages:
                queries.append(query)
                passages.append(tokenize(passage))
                groups.append(number)
    logits = _score(Original(read_weights(folder / "model.onnx"), torch.bfloat16), queries, passages)
    return Labels(queries, passages, np.asarray(groups, np.int32), logits)


def _score(original: Original, queries: Sequence[Ids], passages: Sequence[Ids]) -> npt.NDArray[np.float32]:
    logits: list[float] = []
    with tqdm(total=len(queries), unit="pair", desc="labels") as bar:
        for start in range(0, len(queries), _NUM_AT_ONCE):
            part = slice(start, start + _NUM_AT_ONCE)
            logits += original(list(zip(queries[part], passages[part], strict=True)))
            bar.update(len(logits) - bar.n)
    return np.asarray(logits, np.float32)


def _split(flat: Ids, lengths: npt.NDArray[np.int64]) -> list[Ids]:
    return np.split(flat, np.cumsum(lengths)[:-1])
