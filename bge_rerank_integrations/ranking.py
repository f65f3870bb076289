"""From scores to a ranking: the order, the cut, the sigmoid. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from bge_rerank_integrations.errors import InputError, InputTypeError

BLANK_LOGIT: Final = -65504.0
"""The raw score of a passage with nothing to read: the lowest float16, far below any model's logit.

JSON can hold it, unlike -inf, and every float type holds it exactly. The sigmoid makes it 0.0.
"""
SCALES: Final = (
    "with normalize=True scores lie between 0 and 1; "
    "with normalize=False they are raw logits, roughly -11 to 11"
)


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """One passage's place in a ranking.

    Attributes:
        index: Its position in the list that was ranked.
        score: Its relevance: a raw logit, or 0..1 where the scorer normalizes. A blank passage has the
            lowest value of the scale: 0.0 where the scorer normalizes, else `BLANK_LOGIT`, which is -65504.0.
        truncated: Whether tokens of the passage were left out, because it was too long for the room that
            the query leaves. `Ranking.num_truncated_queries` tells the same of the query.
        windows: How many windows of it were scored: 1 unless `long_passages="windows"`, 0 if it is blank.
        blank: Whether the passage has nothing to read. Such a passage is not scored: it comes after all
            others, and no threshold lets it through.
    """

    index: int
    score: float
    truncated: bool = False
    windows: int = 1
    blank: bool = False


class PairResult(NamedTuple):
    """The score of one pair and how it was read.

    Attributes:
        score: The raw logit, or its sigmoid.
        logit: The raw logit.
        truncated: Whether the passage lost tokens.
        query_truncated: Whether the query did.
        windows: How many windows of the passage were scored.
        num_tokens: How many tokens the model read.
        blank: Whether the passage has nothing to read, so that the pair was not scored.
    """

    score: float
    logit: float
    truncated: bool
    query_truncated: bool
    windows: int
    num_tokens: int
    blank: bool = False


class Ranking(list[RankedPassage]):
    """Ranked passages, best first, and what it took to rank them.

    Attributes:
        num_pairs: Passages that were scored, those cut by `top_n` or `threshold` included.
        num_tokens: Tokens the model read for them.
        num_truncated: How many of the passages lost tokens.
        num_truncated_queries: 1 if the query lost tokens, else 0, so that it sums over rankings.
        num_blank: Passages with nothing to read, which were not scored.
    """

    def __init__(
        self,
        passages: Iterable[RankedPassage] = (),
        *,
        num_pairs: int = 0,
        num_tokens: int = 0,
        num_truncated: int = 0,
        num_truncated_queries: int = 0,
        num_blank: int = 0,
    ) -> None:
        super().__init__(passages)
        self.num_pairs = num_pairs
        self.num_tokens = num_tokens
        self.num_truncated = num_truncated
        self.num_truncated_queries = num_truncated_queries
        self.num_blank = num_blank


def check_top_n(top_n: int | None) -> None:
    """Raise unless `top_n` is None (all), 0 (none) or a positive integer."""
    if top_n is None:
        return
    if not isinstance(top_n, int) or isinstance(top_n, bool):
        raise InputTypeError("top_n must be an integer or None")
    if top_n < 0:
        raise InputError("top_n must not be negative; None is all, 0 is none")


def check_threshold(threshold: float | None, *, normalize: bool) -> None:
    """Raise unless `threshold` is None or a number that can tell scores apart.

    Args:
        threshold: Least score to keep.
        normalize: Whether the scores it is compared with lie between 0 and 1.

    Raises:
        InputTypeError: It is not a number.
        InputError: It is not finite, or off the scale: every normalized score is above 0 and at most 1.
    """
    if threshold is None:
        return
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise InputTypeError("the score threshold must be a number or None")
    if not math.isfinite(threshold):
        raise InputError("the score threshold must be finite, not NaN or infinity; None keeps every score")
    if normalize and not 0 < threshold <= 1:
        effect = "nothing" if threshold > 1 else "everything"
        raise InputError(
            f"a score threshold of {threshold} keeps {effect}: it must be above 0 and at most 1. {SCALES}"
        )


def rank_results(results: Sequence[PairResult], top_n: int | None, threshold: float | None) -> Ranking:
    """Order the results of one query's passages best first, and cut the list.

    The order is that of the logits, since the sigmoid rounds large ones to the same score.

    Args:
        results: In input order; equal logits keep it. Blank passages come last, in input order.
        top_n: Most passages to keep; None is all, 0 is none.
        threshold: Least score to keep, inclusive; None keeps every passage, and any number drops blank ones.
    """
    order = sorted(range(len(results)), key=lambda index: (results[index].blank, -results[index].logit))
    if threshold is not None:
        order = [at for at in order if not results[at].blank and results[at].score >= threshold]
    kept = [(index, results[index]) for index in order[:top_n]]
    num_blank = sum(result.blank for result in results)
    return Ranking(
        (RankedPassage(index, each.score, each.truncated, each.windows, each.blank) for index, each in kept),
        num_pairs=len(results) - num_blank,
        num_tokens=sum(result.num_tokens for result in results),
        num_truncated=sum(result.truncated for result in results),
        num_truncated_queries=int(any(result.query_truncated for result in results)),
        num_blank=num_blank,
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


def sigmoid(logit: float) -> float:
    """Map a logit to 0..1 in double precision, without overflow at either end."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    exponential = math.exp(logit)
    return exponential / (1.0 + exponential)
