"""Encodes the distinct pairs of a request, and assigns their logits to the pairs in the caller's order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from bge_rerank_integrations.errors import InputError, NonFiniteScoreError
from bge_rerank_integrations.ranking import BLANK_LOGIT, PairResult, sigmoid
from bge_rerank_integrations.text.tokenization import EncodedPair, IntArray, PairTokenizer
from bge_rerank_integrations.validation import BLANK_QUERY, Pair


def find_blank(
    tokenizer: PairTokenizer, query: str, passages: Sequence[str], *, refuse: bool
) -> frozenset[str]:
    """Return the passages of a ranking that have nothing to read.

    Args:
        tokenizer: Decides whether a text has nothing to read.
        query: The query of the ranking.
        passages: The passages of the ranking.
        refuse: Whether a blank passage raises an exception.

    Returns:
        The texts of the blank passages.

    Raises:
        InputError: The query is blank, or `refuse` is set and a passage is blank; `.index` says which
            passage.
    """
    if tokenizer.is_blank(query):
        raise InputError(BLANK_QUERY)
    blank = _blank_among(tokenizer, passages)
    if blank and refuse:
        index = _first_index(passages, blank)
        raise InputError(_refusal(index), index=index)
    return blank


def find_blank_in_each(
    tokenizer: PairTokenizer, requests: Sequence[tuple[str, Sequence[str]]], *, refuse: bool
) -> frozenset[str]:
    """Do the same as `find_blank` for several rankings. `.index` of an `InputError` says which request."""
    blank: frozenset[str] = frozenset()
    for number, (query, passages) in enumerate(requests):
        if tokenizer.is_blank(query):
            raise InputError(f"request {number}: {BLANK_QUERY}", index=number)
        new = _blank_among(tokenizer, passages)
        if new and refuse:
            raise InputError(f"request {number}: {_refusal(_first_index(passages, new))}", index=number)
        blank |= new
    return blank


def _blank_among(tokenizer: PairTokenizer, passages: Sequence[str]) -> frozenset[str]:
    return frozenset(passage for passage in dict.fromkeys(passages) if tokenizer.is_blank(passage))


def _first_index(passages: Sequence[str], blank: frozenset[str]) -> int:
    return next(index for index, passage in enumerate(passages) if passage in blank)


def _refusal(index: int) -> str:
    return f"passage {index} has nothing to read; leave it out, or set blank_passages='last'"


class PreparedPairs:
    """The pairs of a request in the caller's order, and the token ids of each distinct pair.

    Args:
        pairs: (query, passage) pairs.
        blank: Passages that are not scored.

    Attributes:
        pairs: All pairs of the request.
        encoded: The distinct pairs that have been encoded so far, in order. Pairs with a blank passage are
            never encoded.
        num_blank: Number of pairs with a blank passage.
    """

    def __init__(self, pairs: Sequence[Pair], blank: frozenset[str] = frozenset()) -> None:
        self.pairs = pairs
        self.encoded: dict[Pair, EncodedPair] = {}
        self._blank = blank
        with_text = [pair for pair in pairs if pair[1] not in blank] if blank else pairs
        self.num_blank = len(pairs) - len(with_text)
        self._distinct = list(dict.fromkeys(with_text))

    def encode(self, tokenizer: PairTokenizer, num_pairs: int) -> Iterator[list[IntArray]]:
        """Encode `num_pairs` distinct pairs at a time, and yield the windows of each such part.

        A window is a sequence for the model: int32 token ids, special tokens included.
        """
        distinct = iter(self._distinct)
        for encoded in tokenizer.stream(self._distinct, num_pairs):
            self.encoded.update(zip(islice(distinct, len(encoded)), encoded, strict=True))
            yield [window for each in encoded for window in each.windows]

    @property
    def num_left(self) -> int:
        """Number of distinct pairs that have not been encoded yet."""
        return len(self._distinct) - len(self.encoded)

    @property
    def num_duplicates(self) -> int:
        """Number of pairs that share the score of an equal pair."""
        return len(self.pairs) - self.num_blank - len(self._distinct)

    @property
    def num_truncated(self) -> int:
        """Number of pairs whose passage lost tokens."""
        return sum(self.encoded[pair].truncated for pair in self.pairs if pair[1] not in self._blank)

    @property
    def num_truncated_queries(self) -> int:
        """Number of distinct queries that lost tokens."""
        return len({query for (query, _), encoded in self.encoded.items() if encoded.query_truncated})

    def results(self, logits: Sequence[float], *, normalize: bool) -> list[PairResult]:
        """Return the score of each pair, which is the best score of its windows.

        Args:
            logits: One logit for each window, in the order in which `encode` yielded the windows.
            normalize: Whether to apply a sigmoid to the scores.

        Returns:
            One result for each pair, in the caller's order.

        Raises:
            NonFiniteScoreError: A logit is NaN or infinite; `.index` is the position of the first such pair.
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
                logit=best,
                truncated=encoded.truncated,
                query_truncated=encoded.query_truncated,
                windows=len(window_logits),
                num_tokens=sum(map(len, encoded.windows)),
            )
        blank = PairResult(
            score=sigmoid(BLANK_LOGIT) if normalize else BLANK_LOGIT,
            logit=BLANK_LOGIT,
            truncated=False,
            query_truncated=False,
            windows=0,
            num_tokens=0,
            blank=True,
        )
        return [blank if pair[1] in self._blank else results[pair] for pair in self.pairs]
