"""The training set: pairs of token ids. The original model computes their targets during training."""

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

# Number of queries per kind of document. Package descriptions are the most varied.
_NUM_QUERIES = {"descriptions": 900, "articles": 600, "docstrings": 300}
_MAX_QUERY_LENGTH = 64
_SEED = 20261124
_DEPTH = 50
_NUM_NEAR = 4  # out of BM25's best ten passages
_NUM_FAR = 2  # out of BM25's other forty passages


@dataclass(frozen=True)
class Pairs:
    """Pairs of token ids in the original's vocabulary, without special tokens.

    Attributes:
        queries: The ids of each pair's query.
        passages: The ids of each pair's passage.
    """

    queries: list[Ids]
    passages: list[Ids]

    def save(self, path: Path) -> None:
        """Write the pairs to an .npz file."""
        np.savez(
            path,
            queries=np.concatenate(self.queries),
            query_lengths=[len(ids) for ids in self.queries],
            passages=np.concatenate(self.passages),
            passage_lengths=[len(ids) for ids in self.passages],
        )


def load(path: Path) -> Pairs:
    """Read a file that `Pairs.save` wrote."""
    data = np.load(path)
    return Pairs(
        _split(data["queries"], data["query_lengths"]),
        _split(data["passages"], data["passage_lengths"]),
    )


def make(cache: Path, scifact: Path) -> Pairs:
    """Generate pairs from the pinned sources.

    Args:
        cache: Folder for the pinned sources, which are downloaded if they are missing.
        scifact: Folder of SciFact as BEIR publishes it. The queries of its train split are used.
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
    """Yield each judged query with its relevant passages, six others that BM25 finds and a random one."""
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
