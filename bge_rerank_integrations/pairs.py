"""One request's pairs: encoded once each, and put together again when their logits are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bge_rerank_integrations.errors import NonFiniteScoreError
from bge_rerank_integrations.ranking import sigmoid
from bge_rerank_integrations.tokenization import EncodedPair, IntArray, PairTokenizer

Pair = tuple[str, str]


class PairResult(NamedTuple):
    """What came of one pair; the fields are those of `RankedPassage`, and how many tokens were read."""

    score: float
    truncated: bool
    windows: int
    num_tokens: int


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs of one request, in the caller's order, and the ids of each distinct one."""

    pairs: Sequence[Pair]
    encoded: dict[Pair, EncodedPair]

    @property
    def windows(self) -> list[IntArray]:
        """The sequences to score: all windows of all distinct pairs."""
        return [window for pair in self.encoded.values() for window in pair.windows]

    @property
    def num_duplicates(self) -> int:
        """How many pairs are scored by way of an equal one."""
        return len(self.pairs) - len(self.encoded)

    @property
    def num_truncated(self) -> int:
        """How many pairs lost tokens."""
        return sum(self.encoded[pair].truncated for pair in self.pairs)

    def results(self, logits: Sequence[float], *, normalize: bool) -> list[PairResult]:
        """Give each pair its best window's score.

        Args:
            logits: One a window, in the order of `windows`.
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


def prepare(tokenizer: PairTokenizer, queries: Sequence[str], passages: Sequence[str]) -> PreparedPairs:
    """Encode the pairs `zip(queries, passages)`, each distinct one once."""
    pairs = list(zip(queries, passages, strict=True))
    distinct = list(dict.fromkeys(pairs))
    encoded = tokenizer.encode([query for query, _ in distinct], [passage for _, passage in distinct])
    return PreparedPairs(pairs, dict(zip(distinct, encoded, strict=True)))
