"""Named workloads, generated from a seed."""

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
    """Sizes of a generated workload.

    Attributes:
        title: Description of the workload.
        num_queries: Number of distinct queries.
        num_passages: Number of passages per query.
        length: Number of tokens in each pair. None draws lengths from a log-normal distribution.
        num_query_words: Number of words in each query.
        num_calls: Number of calls per repeat. More than 1 if a single call is too short to time.
    """

    title: str
    num_queries: int
    num_passages: int
    length: int | None = None
    num_query_words: int = NUM_QUERY_WORDS
    num_calls: int = 1

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return self.num_queries * self.num_passages


SPECS: Final = {
    "A": Spec("one query, passages of mixed length", 1, 100),
    "B": Spec("queries with 100 passages of mixed length each", 32, 100),
    "C": Spec("one query, each pair 512 tokens", 1, 100, MAX_LENGTH),
    "D": Spec("one query, short passages", 1, 8, 32, 3, 20),
    "E": Spec("many queries with 100 passages of mixed length each", 100, 100),
}
LETTERS: Final = (*SPECS, REAL_TEXT)


@dataclass(frozen=True)
class Workload:
    """Pairs to score in one call.

    Attributes:
        name: A letter, or another name that is unique within a run.
        title: Description of the workload.
        pairs: The pairs, grouped by query.
        num_tokens: Number of tokens in each pair, including special tokens, with this package's tokenizer.
        num_calls: Number of calls per repeat.
    """

    name: str
    title: str
    pairs: Pairs
    num_tokens: list[int]
    num_calls: int = 1

    def texts(self, repeat: int) -> list[Pairs]:
        """Return the pairs for each call of one repeat. No two calls share a passage."""
        return [reworded(self.pairs, f"{self.name} {repeat} {call}") for call in range(self.num_calls)]

    def first(self, num_pairs: int) -> Workload:
        """Return a workload with only the first `num_pairs` pairs."""
        return dataclasses.replace(
            self,
            name=f"{self.name}, {num_pairs}",
            pairs=self.pairs[:num_pairs],
            num_tokens=self.num_tokens[:num_pairs],
        )

    def describe(self) -> dict[str, Any]:
        """Return the description of the workload for a report."""
        return {
            "name": self.name,
            "title": self.title,
            "num_pairs": len(self.pairs),
            "num_tokens": sum(self.num_tokens),
            "median_tokens": statistics.median(self.num_tokens),
            "max_tokens": max(self.num_tokens),
        }


class WorkloadMaker:
    """Generates workloads for one model.

    Args:
        tokenizer_path: The model's `tokenizer.json`.
        seed: Seed of the pairs.
    """

    def __init__(self, tokenizer_path: Path, seed: int) -> None:
        self._maker = PairMaker(tokenizer_path)
        self._tokenizer = PairTokenizer(tokenizer_path, ScorerConfig())
        self._seed = seed

    def make(
        self, letter: str, *, num_pairs: int | None = None, length: int | None = None, name: str | None = None
    ) -> Workload:
        """Generate a workload of random words.

        Args:
            letter: Letter of the workload in `SPECS`.
            num_pairs: Number of pairs. None means the workload's own number.
            length: Number of tokens in each pair. None means the workload's own length.
            name: Name of the workload. None means the letter.
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
        """Build workload F: BM25's best passages for queries of a BEIR folder.

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
        """Return the token ids of each pair, int32 as bytes."""
        encoded = self._tokenizer.encode([query for query, _ in pairs], [passage for _, passage in pairs])
        return [pair.windows[0].tobytes() for pair in encoded]

    def count(self, pairs: Pairs) -> list[int]:
        """Return the number of tokens in each pair."""
        return [len(ids) // 4 for ids in self.ids(pairs)]
