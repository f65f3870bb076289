"""One request's pairs: encoded once each, and put together again when their logits are there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bge_rerank_integrations.errors import NonFiniteScoreError
from bge_rerank_integrations.ranking import RankedPassage, Ranking, select, sigmoid
from bge_rerank_integrations.tokenization import EncodedPair, IntArray, PairTokenizer

Pair = tuple[str, str]


class PairResult(NamedTuple):
    """What came of one pair; the fields are those of `RankedPassage`, and how many tokens were read."""

    score: float
    truncated: bool
    windows: int
    num_tokens: int


class PreparedPairs:
    """The pairs of one request, in the caller's order, and the ids of each distinct one.

    Args:
        queries: The query of each pair.
        passages: The passage of each pair, of equal number.

    Attributes:
        pairs: All of them.
        encoded: The distinct ones that are encoded, in order.
    """

    def __init__(self, queries: Sequence[str], passages: Sequence[str]) -> None:
        self.pairs: list[Pair] = list(zip(queries, passages, strict=True))
        self.encoded: dict[Pair, EncodedPair] = {}
        self._distinct = list(dict.fromkeys(self.pairs))

    def encode(self, tokenizer: PairTokenizer, num_pairs: int) -> Iterator[list[IntArray]]:
        """Encode the distinct pairs, so many at a time, and yield their windows, which is what to score."""
        queries, passages = [query for query, _ in self._distinct], [passage for _, passage in self._distinct]
        pairs = iter(self._distinct)
        for encoded in tokenizer.stream(queries, passages, num_pairs):
            self.encoded.update((pair, each) for each, pair in zip(encoded, pairs, strict=False))
            yield [window for each in encoded for window in each.windows]

    @property
    def num_left(self) -> int:
        """How many distinct pairs are still to be encoded."""
        return len(self._distinct) - len(self.encoded)

    @property
    def num_duplicates(self) -> int:
        """How many pairs are scored by way of an equal one."""
        return len(self.pairs) - len(self._distinct)

    @property
    def num_truncated(self) -> int:
        """How many pairs lost tokens."""
        return sum(self.encoded[pair].truncated for pair in self.pairs)

    def results(self, logits: Sequence[float], *, normalize: bool) -> list[PairResult]:
        """Give each pair its best window's score.

        Args:
            logits: One a window, in the order in which `encode` gave them.
            normalize: Put scores through a sigmoid.

        Raises:
            NonFiniteScoreError: A logit is NaN or infinite; `.index` is the first such pair's.
        """
        values = iter(logits)
        results: dict[Pair, PairResult] = {}
        for pair, encoded in self.encoded.items():
            window_logits = [next(values) for _ in encoded.windows]
            if not all(map(math.isfinite, window_logits)):
                index = self.pairs.index(pair)
                raise NonFiniteScoreError(f"the model's score of pair {index} is not finite", index=index)
            best = max(window_logits)
            results[pair] = PairResult(
                score=sigmoid(best) if normalize else best,
                truncated=encoded.truncated,
                windows=len(window_logits),
                num_tokens=sum(map(len, encoded.windows)),
            )
        return [results[pair] for pair in self.pairs]


def rank_results(results: Sequence[PairResult], top_n: int | None, threshold: float | None) -> Ranking:
    """Order the results of one query's passages and cut them, as `select` does."""
    ranked = [
        RankedPassage(index, result.score, result.truncated, result.windows)
        for index, result in enumerate(results)
    ]
    return Ranking(
        select(ranked, top_n, threshold),
        num_pairs=len(results),
        num_tokens=sum(result.num_tokens for result in results),
        num_truncated=sum(result.truncated for result in results),
    )


def rank_each(
    requests: Sequence[tuple[str, Sequence[str]]],
    results: Sequence[PairResult],
    top_n: int | None,
    threshold: float | None,
) -> list[Ranking]:
    """Rank each request's passages; `results` are those of all requests, one after the other."""
    remaining = iter(results)
    return [rank_results([next(remaining) for _ in texts], top_n, threshold) for _, texts in requests]
