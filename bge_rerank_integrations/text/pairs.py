"""Encodes the distinct pairs of a call, and returns scores and rankings in the caller's order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice, pairwise
from typing import Final

from bge_rerank_integrations.config import BlankPassages
from bge_rerank_integrations.errors import InputError, NonFiniteScoreError
from bge_rerank_integrations.ranking import (
    BLANK_LOGIT,
    RankedPassage,
    Ranking,
    Selection,
    select,
    sigmoid,
)
from bge_rerank_integrations.text.tokenization import EncodedPair, IntArray, PairTokenizer
from bge_rerank_integrations.validation import BLANK_QUERY, Pair, naming_request

# A longer request is encoded in parts of at most this many pairs. Unless the queue has a limit, the device
# computes a part while the next one is encoded. The first part is small, so that an idle device starts soon.
_NUM_FIRST_PAIRS: Final = 32
_NUM_PAIRS_AT_ONCE: Final = 512
# From this many pairs on, the rest is divided even if it fits into one part. The device then does not wait
# until all of them are encoded.
_NUM_DIVIDED_PAIRS: Final = 64

# Stands for a pair with a blank passage.
_NOT_ENCODED: Final = EncodedPair((), truncated=False, query_truncated=False)


class PreparedPairs:
    """The (query, passage) pairs of a call, and the token ids of each distinct pair.

    Args:
        requests: (query, passages) of each request of the call.
        blank_passages: What to do with blank passages, as in `ScorerConfig`. None scores them like others,
            and accepts blank queries too.
        names_request: Whether `.index` of an `InputError` says which request, instead of which passage.

    Attributes:
        num_pairs: Number of pairs of all requests.
        num_blank: Number of pairs with a blank passage, which are never encoded. It is known when `encode`
            has yielded once.
    """

    def __init__(
        self,
        requests: Sequence[tuple[str, Sequence[str]]],
        *,
        blank_passages: BlankPassages | None = None,
        names_request: bool = False,
    ) -> None:
        self.num_pairs = sum(len(passages) for _, passages in requests)
        self.num_blank = 0
        self._requests = requests
        self._blank_passages = blank_passages
        self._names_request = names_request
        self._distinct: list[Pair] = []
        self._encoded: dict[Pair, EncodedPair] = {}  # in the order of the distinct pairs

    def encode(self, tokenizer: PairTokenizer) -> Iterator[list[IntArray]]:
        """Encode the distinct pairs in parts, and yield the windows of each part.

        A window is a sequence for the model: int32 token ids, special tokens included.

        Args:
            tokenizer: Encodes the pairs, and decides which texts are blank.

        Raises:
            InputError: A query is blank, or blank passages are refused and one is blank.
        """
        blank = frozenset[str]() if self._blank_passages is None else self._find_blank(tokenizer)
        with_text = [pair for pair in self._pairs() if pair[1] not in blank]
        self.num_blank = self.num_pairs - len(with_text)
        self._distinct = list(dict.fromkeys(with_text))
        self._encoded.clear()  # an earlier attempt may have failed because the queue was full
        distinct = iter(self._distinct)
        for encoded in tokenizer.stream(self._distinct, _part_sizes(len(self._distinct))):
            self._encoded.update(zip(islice(distinct, len(encoded)), encoded, strict=True))
            yield [window for each in encoded for window in each.windows]

    @property
    def num_left(self) -> int:
        """Number of distinct pairs that have not been encoded yet."""
        return len(self._distinct) - len(self._encoded)

    @property
    def num_duplicates(self) -> int:
        """Number of pairs that share the score of an equal pair."""
        return self.num_pairs - self.num_blank - len(self._distinct)

    @property
    def num_truncated(self) -> int:
        """Number of pairs whose passage lost tokens."""
        if not any(encoded.truncated for encoded in self._encoded.values()):
            return 0
        return sum(self._encoded.get(pair, _NOT_ENCODED).truncated for pair in self._pairs())

    @property
    def num_truncated_queries(self) -> int:
        """Number of distinct queries that lost tokens."""
        return len({query for (query, _), encoded in self._encoded.items() if encoded.query_truncated})

    def scores(self, logits: Sequence[float], *, normalize: bool, start: int = 0) -> list[float]:
        """Return the score of each pair.

        Args:
            logits: One logit for each window, in the order in which `encode` yielded the windows. The score
                of a pair is the best score of its windows.
            normalize: Whether to apply a sigmoid to the scores.
            start: The index of the first pair, for error messages.

        Returns:
            One score for each pair, in the caller's order.

        Raises:
            NonFiniteScoreError: A logit is NaN or infinite; `.index` is the position of the first such pair.
        """
        best = self._best_logits(logits, start)
        return [sigmoid(best[pair]) if normalize else best[pair] for pair in self._pairs()]

    def rankings(self, logits: Sequence[float], selection: Selection) -> list[Ranking]:
        """Return the ranking of each request.

        Args:
            logits: As in `scores`.
            selection: The passages to keep of each ranking, and the scale of the scores.

        Returns:
            One ranking for each request, in order.

        Raises:
            NonFiniteScoreError: As in `scores`.
        """
        best = self._best_logits(logits, 0)
        return [self._ranking(query, passages, best, selection) for query, passages in self._requests]

    def _find_blank(self, tokenizer: PairTokenizer) -> frozenset[str]:
        """Return the passages that are blank."""
        blank: frozenset[str] = frozenset()
        for number, (query, passages) in enumerate(self._requests):
            with naming_request(number) if self._names_request else nullcontext():
                blank |= _blank_of(tokenizer, query, passages, refuse=self._blank_passages == "refuse")
        return blank

    def _ranking(
        self, query: str, passages: Sequence[str], best: dict[Pair, float], selection: Selection
    ) -> Ranking:
        encoded = [self._encoded.get((query, passage), _NOT_ENCODED) for passage in passages]
        logits = [best.get((query, passage), BLANK_LOGIT) for passage in passages]
        ranked = [
            RankedPassage(
                index,
                sigmoid(logit) if selection.normalize else logit,
                truncated=each.truncated,
                windows=len(each.windows),
                blank=each is _NOT_ENCODED,
            )
            for index, (each, logit) in enumerate(zip(encoded, logits, strict=True))
        ]
        num_blank = sum(passage.blank for passage in ranked)
        return Ranking(
            select(ranked, logits, selection.top_n, selection.threshold),
            num_pairs=len(ranked) - num_blank,
            num_tokens=sum(len(window) for each in encoded for window in each.windows),
            num_truncated=sum(each.truncated for each in encoded),
            num_truncated_queries=int(any(each.query_truncated for each in encoded)),
            num_blank=num_blank,
        )

    def _best_logits(self, logits: Sequence[float], start: int) -> dict[Pair, float]:
        """Return the best logit of the windows of each distinct pair."""
        values = iter(logits)
        best: dict[Pair, float] = {}
        for pair, encoded in self._encoded.items():
            window_logits = list(islice(values, len(encoded.windows)))
            if not all(map(math.isfinite, window_logits)):
                index = start + next(index for index, each in enumerate(self._pairs()) if each == pair)
                raise NonFiniteScoreError(f"the model's score of pair {index} is not finite", index=index)
            best[pair] = max(window_logits)
        return best

    def _pairs(self) -> Iterator[Pair]:
        return ((query, passage) for query, passages in self._requests for passage in passages)


def _blank_of(
    tokenizer: PairTokenizer, query: str, passages: Sequence[str], *, refuse: bool
) -> frozenset[str]:
    """Return the blank passages of one request. Raise an error for a blank query."""
    if tokenizer.is_blank(query):
        raise InputError(BLANK_QUERY)
    blank = frozenset(passage for passage in dict.fromkeys(passages) if tokenizer.is_blank(passage))
    if blank and refuse:
        index = next(index for index, passage in enumerate(passages) if passage in blank)
        raise InputError(f"passage {index} is blank; leave it out, or set blank_passages='last'", index=index)
    return blank


def _part_sizes(num_pairs: int) -> list[int]:
    """Divide pairs into the parts in which a request is encoded. Return the number of pairs in each part."""
    first = min(num_pairs, _NUM_FIRST_PAIRS)
    rest = num_pairs - first
    num_parts = max(-(-rest // _NUM_PAIRS_AT_ONCE), 2 if rest >= _NUM_DIVIDED_PAIRS else 1)
    ends = [rest * index // num_parts for index in range(num_parts + 1)]
    return [first, *(end - start for start, end in pairwise(ends) if end > start)]
