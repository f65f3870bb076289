"""What is scored: named, seeded workloads."""

from __future__ import annotations

import dataclasses
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.common import MAX_LENGTH, NUM_QUERY_WORDS, PairMaker, Pairs, reworded
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import read_beir
from bge_rerank_integrations.text.tokenization import PairTokenizer

REAL_TEXT: Final = "F"
_QUERIES_OF_REAL_TEXT: Final = 10
_CANDIDATES: Final = 100


class Spec(NamedTuple):
    """What a made-up workload consists of.

    Attributes:
        title: What it stands for.
        num_queries: Distinct queries.
        num_passages: Of each query.
        length: Tokens of each pair; None is log-normal.
        num_query_words: Words of a query.
        num_calls: Calls a repeat, where one alone would be too short to time.
    """

    title: str
    num_queries: int
    num_passages: int
    length: int | None = None
    num_query_words: int = NUM_QUERY_WORDS
    num_calls: int = 1

    @property
    def num_pairs(self) -> int:
        """How many pairs it has."""
        return self.num_queries * self.num_passages


SPECS: Final = {
    "A": Spec("one query, 100 passages of mixed length", 1, 100),
    "B": Spec("32 queries, 100 passages of mixed length each", 32, 100),
    "C": Spec("one query, 100 passages, each pair 512 tokens", 1, 100, MAX_LENGTH),
    "D": Spec("one query, 8 short passages: latency", 1, 8, 32, 3, 20),
    "E": Spec("100 queries, 100 passages of mixed length each", 100, 100),
}
LETTERS: Final = (*SPECS, REAL_TEXT)


@dataclass(frozen=True)
class Workload:
    """Pairs to be scored in one call.

    Attributes:
        name: A letter, or what tells it from the others of a run.
        title: What it stands for.
        pairs: Those of one query are neighbours.
        num_tokens: Tokens of each pair, special ones included, as this package reads it.
        num_calls: Calls a repeat.
    """

    name: str
    title: str
    pairs: Pairs
    num_tokens: list[int]
    num_calls: int = 1

    def texts(self, repeat: int) -> list[Pairs]:
        """Return the pairs of each call of one repeat; no passage of one is in another."""
        return [reworded(self.pairs, f"{self.name} {repeat} {call}") for call in range(self.num_calls)]

    def first(self, num_pairs: int) -> Workload:
        """Return a workload of its first pairs alone."""
        return dataclasses.replace(
            self,
            name=f"{self.name}, {num_pairs}",
            pairs=self.pairs[:num_pairs],
            num_tokens=self.num_tokens[:num_pairs],
        )

    def describe(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "name": self.name,
            "title": self.title,
            "num_pairs": len(self.pairs),
            "num_tokens": sum(self.num_tokens),
            "median_tokens": statistics.median(self.num_tokens),
            "max_tokens": max(self.num_tokens),
        }


class WorkloadMaker:
    """Makes workloads for one model.

    Args:
        tokenizer_path: Of the model.
        seed: Of the pairs.
    """

    def __init__(self, tokenizer_path: Path, seed: int) -> None:
        self._maker = PairMaker(tokenizer_path)
        self._tokenizer = PairTokenizer(tokenizer_path, ScorerConfig())
        self._seed = seed

    def make(
        self, letter: str, *, num_pairs: int | None = None, length: int | None = None, name: str | None = None
    ) -> Workload:
        """Make a workload of random words.

        Args:
            letter: One of `SPECS`.
            num_pairs: How many pairs to make; None is as many as it has.
            length: Tokens of each pair instead of its own.
            name: Instead of the letter.
        """
        spec = SPECS[letter]
        wanted = num_pairs or spec.num_pairs
        pairs: Pairs = []
        while len(pairs) < wanted:
            pairs += self._maker.pairs(
                min(spec.num_passages, wanted - len(pairs)),
                self._seed + 1000 * (len(pairs) // spec.num_passages),
                length=length or spec.length,
                num_query_words=spec.num_query_words,
            )
        return Workload(name or letter, spec.title, pairs, self.count(pairs), spec.num_calls)

    def make_real(self, folder: Path, num_pairs: int | None) -> Workload:
        """Make workload F: BM25's best passages for a BEIR folder's queries.

        Raises:
            DatasetError: The folder cannot be read.
            MissingExtraError: bm25s is not installed.
        """
        dataset = read_beir(folder)
        queries = dataset.judged_queries()
        wanted = num_pairs or _QUERIES_OF_REAL_TEXT * _CANDIDATES
        ids = sorted(queries)
        chosen = random.Random(self._seed).sample(ids, min(len(ids), -(-wanted // _CANDIDATES)))
        run = Bm25(dataset.corpus).search({query_id: queries[query_id] for query_id in chosen}, _CANDIDATES)
        pairs = [
            (queries[query_id], dataset.corpus[passage_id])
            for query_id, scores in run.items()
            for passage_id in scores
        ][:wanted]
        title = f"{folder.resolve().name}, BM25's best {_CANDIDATES}"
        return Workload(REAL_TEXT, title, pairs, self.count(pairs))

    def ids(self, pairs: Pairs) -> list[bytes]:
        """Return the int32 ids of each pair, as bytes."""
        encoded = self._tokenizer.encode([query for query, _ in pairs], [passage for _, passage in pairs])
        return [pair.windows[0].tobytes() for pair in encoded]

    def count(self, pairs: Pairs) -> list[int]:
        """Return how many tokens each pair has."""
        return [len(ids) // 4 for ids in self.ids(pairs)]
