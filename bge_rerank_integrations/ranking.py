"""From scores to a ranking: the order, the cut, the sigmoid. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bge_rerank_integrations.errors import InputError, InputTypeError


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """One passage's place in a ranking.

    Attributes:
        index: Its position in the list that was ranked.
        score: Its relevance: a raw logit, or 0..1 where the scorer normalizes.
        truncated: Whether tokens of the pair were left out: of the passage where it was too long for
            the room the query leaves, or of the query where it exceeds `query_max_length`.
        windows: How many windows of it were scored; 1 unless `long_passages="windows"`.
    """

    index: int
    score: float
    truncated: bool = False
    windows: int = 1


class Ranking(list[RankedPassage]):
    """Ranked passages, best first, and what it took to rank them.

    Attributes:
        num_pairs: Passages that were scored, those cut by `top_n` or `threshold` included.
        num_tokens: Tokens the model read for them.
        num_truncated: How many of the pairs lost tokens.
    """

    def __init__(
        self,
        passages: Iterable[RankedPassage] = (),
        *,
        num_pairs: int = 0,
        num_tokens: int = 0,
        num_truncated: int = 0,
    ) -> None:
        super().__init__(passages)
        self.num_pairs = num_pairs
        self.num_tokens = num_tokens
        self.num_truncated = num_truncated


def check_top_n(top_n: int | None) -> None:
    """Raise unless `top_n` is None (all), 0 (none) or a positive integer."""
    if top_n is None:
        return
    if not isinstance(top_n, int) or isinstance(top_n, bool):
        raise InputTypeError("top_n must be an integer or None")
    if top_n < 0:
        raise InputError("top_n must not be negative; None is all, 0 is none")


def check_threshold(threshold: float | None) -> None:
    """Raise unless `threshold` is None or a number other than NaN."""
    if threshold is None:
        return
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise InputTypeError("the score threshold must be a number or None")
    if math.isnan(threshold):
        raise InputError("the score threshold must not be NaN")


def select(
    passages: Sequence[RankedPassage], top_n: int | None, threshold: float | None
) -> list[RankedPassage]:
    """Order passages best first and cut the list.

    Args:
        passages: In input order; equal scores keep it.
        top_n: Most passages to keep; None is all, 0 is none.
        threshold: Least score to keep, inclusive; None keeps every score.
    """
    ranked = sorted(passages, key=lambda passage: -passage.score)
    if threshold is not None:
        ranked = [passage for passage in ranked if passage.score >= threshold]
    return ranked[:top_n]


def sigmoid(logit: float) -> float:
    """Map a logit to 0..1 in double precision, without overflow at either end."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    exponential = math.exp(logit)
    return exponential / (1.0 + exponential)
