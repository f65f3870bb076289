"""The training set: pairs of ids; what they are worth, the original says while it is being imitated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import BeirDataset, read_beir
from training import sources
from training.original import Ids, load_tokenizer
from training.pairs import Group, make_groups
from training.texts import documents

# Of each kind of document; package descriptions are the most various.
_NUM_QUERIES = {"descriptions": 900, "articles": 600, "docstrings": 300}
_MAX_QUERY_LENGTH = 64
_SEED = 20261124
_DEPTH = 50
_NUM_NEAR = 4  # of the ten that BM25 likes best
_NUM_FAR = 2  # of the other forty


@dataclass(frozen=True)
class Pairs:
    """Pairs of the original's ids, without control tokens.

    Attributes:
        queries: The ids of each pair's query.
        passages: The ids of each pair's passage.
    """

    queries: list[Ids]
    passages: list[Ids]

    def save(self, path: Path) -> None:
        """Write one .npz file."""
        np.savez(
            path,
            queries=np.concatenate(self.queries),
            query_lengths=[len(ids) for ids in self.queries],
            passages=np.concatenate(self.passages),
            passage_lengths=[len(ids) for ids in self.passages],
        )


def load(path: Path) -> Pairs:
    """Read what `Pairs.save` wrote."""
    data = np.load(path)
    return Pairs(
        _split(data["queries"], data["query_lengths"]),
        _split(data["passages"], data["passage_lengths"]),
    )


def make(cache: Path, scifact: Path) -> Pairs:
    """Make pairs from the pinned sources.

    Args:
        cache: Where the pinned sources lie, or are put.
        scifact: SciFact as BEIR publishes it; the queries of its train split are used.
    """
    tokenize = load_tokenizer(sources.fetch_model(cache))
    queries: list[Ids] = []
    passages: list[Ids] = []
    for group in _groups(cache, scifact):
        query = tokenize(group.query)[:_MAX_QUERY_LENGTH]
        for passage in group.passages:
            queries.append(query)
            passages.append(tokenize(passage))
    return Pairs(queries, passages)


def _groups(cache: Path, scifact: Path) -> Iterator[Group]:
    for seed, (source, found) in enumerate(documents(cache).items(), start=_SEED):
        yield from make_groups(found, _NUM_QUERIES[source], seed=seed)
    judged = read_beir(scifact, "train")
    sources.verify_scifact(judged)
    yield from judged_groups(judged, seed=_SEED)


def judged_groups(dataset: BeirDataset, *, seed: int) -> Iterator[Group]:
    """Give each judged query its relevant passages, six others that BM25 finds and a random one."""
    rng = random.Random(seed)
    found = Bm25(dataset.corpus).search(dataset.judged_queries(), _DEPTH)
    everything = list(dataset.corpus)
    for query_id, scores in found.items():
        relevant = [passage for passage, relevance in dataset.qrels[query_id].items() if relevance > 0]
        others = [passage for passage in scores if passage not in relevant]
        near, far = others[:10], others[10:]
        picked = [
            *relevant,
            *rng.sample(near, min(_NUM_NEAR, len(near))),
            *rng.sample(far, min(_NUM_FAR, len(far))),
            rng.choice(everything),
        ]
        yield Group(dataset.queries[query_id], [dataset.corpus[passage] for passage in picked])


def _split(flat: Ids, lengths: npt.NDArray[np.int64]) -> list[Ids]:
    return np.split(flat, np.cumsum(lengths)[:-1])
