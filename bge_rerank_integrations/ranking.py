"""Turns scores into rankings: sigmoid, order, `top_n` and threshold. Pure Python."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from bge_rerank_integrations.errors import InputError, InputTypeError

BLANK_LOGIT: Final = -65504.0
"""The raw score of a blank passage: the lowest float16 number, far below the logits of any model.

Unlike -inf it is valid JSON, and every float type represents it exactly. Its sigmoid is 0.0.
"""
SCALES: Final = (
    "with normalize=True scores lie between 0 and 1; "
    "with normalize=False they are raw logits, roughly -11 to 11"
)


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage of a ranking.

    Attributes:
        index: Position of the passage in the list that was ranked.
        score: Relevance of the passage: a raw logit, or a number from 0 to 1 if the scorer normalizes. A
            blank passage has the lowest value of the scale: 0.0 if the scorer normalizes, else `BLANK_LOGIT`,
            which is -65504.0.
        truncated: Whether the passage lost tokens because it was too long for the space that the query
            leaves. `Ranking.num_truncated_queries` has the same information about the query.
        windows: Number of windows of the passage that were scored. It is 1 unless `long_passages="windows"`,
            and 0 for a blank passage.
        blank: Whether the passage is blank. The model does not score a blank passage. It ranks
            after all others, and every threshold removes it.

    Example:
        >>> RankedPassage(index=3, score=0.98).truncated
        False
    """

    index: int
    score: float
    truncated: bool = False
    windows: int = 1
    blank: bool = False


class Selection(NamedTuple):
    """The passages that a ranking keeps, and the scale of its scores.

    Attributes:
        top_n: Maximum number of passages. None keeps all.
        threshold: Minimum score, inclusive and on the scale of the scores. None keeps every passage.
        normalize: Whether the scores are sigmoids of the logits.
    """

    top_n: int | None
    threshold: float | None
    normalize: bool


class Ranking(list[RankedPassage]):
    """A list of ranked passages, best first, with figures about the request.

    Attributes:
        num_pairs: Number of passages that were scored, including those that `top_n` or `threshold` removed.
        num_tokens: Number of tokens that the model read.
        num_truncated: Number of passages that lost tokens.
        num_truncated_queries: 1 if the query lost tokens, else 0. It can be summed over rankings.
        num_blank: Number of blank passages, which were not scored.

    Example:
        >>> ranking = scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."])
        >>> [passage.index for passage in ranking], ranking.num_pairs
        ([1, 0], 2)
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
    """Raise `InputError` unless `top_n` is None (all passages), 0 (no passage) or a positive integer."""
    if top_n is None:
        return
    if not isinstance(top_n, int) or isinstance(top_n, bool):
        raise InputTypeError("top_n must be an integer or None")
    if top_n < 0:
        raise InputError("top_n must not be negative; None means all, 0 means none")


def check_threshold(threshold: float | None, *, normalize: bool) -> None:
    """Raise unless `threshold` is None or a number that can separate scores.

    Args:
        threshold: Minimum score to keep.
        normalize: Whether the scores are normalized. Normalized scores are above 0 and at most 1.

    Raises:
        InputTypeError: The threshold is not a number.
        InputError: The threshold is not finite, or it is outside the range of normalized scores.
    """
    if threshold is None:
        return
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise InputTypeError("the score threshold must be a number or None")
    if not abs(threshold) <= sys.float_info.max:  # also False for NaN
        raise InputError("the score threshold must be finite, not NaN or infinity; None keeps every score")
    if normalize and not 0 < threshold <= 1:
        effect = "nothing" if threshold > 1 else "everything"
        raise InputError(
            f"a score threshold of {threshold} keeps {effect}: it must be above 0 and at most 1; {SCALES}"
        )


def check_selection(top_n: int | None, threshold: float | None, *, normalize: bool) -> Selection:
    """Check the arguments of a ranking, and return them.

    Raises:
        InputError: An argument is out of range, or has the wrong type.
    """
    if not isinstance(normalize, bool):
        raise InputTypeError("normalize must be True, False or None")
    check_top_n(top_n)
    check_threshold(threshold, normalize=normalize)
    return Selection(top_n, threshold, normalize)


def select(
    passages: Sequence[RankedPassage], logits: Sequence[float], top_n: int | None, threshold: float | None
) -> list[RankedPassage]:
    """Sort passages, best first, and apply `top_n` and `threshold`.

    Passages are sorted by logit, because the sigmoid rounds different large logits to the same score.
    Passages with equal logits stay in input order. Blank passages come last, in input order.

    Args:
        passages: The passages, in input order.
        logits: The logit of each passage.
        top_n: Maximum number of passages to keep. None keeps all, 0 keeps none.
        threshold: Minimum score to keep, inclusive. None keeps every passage. Any number removes blank
            passages.

    Returns:
        The passages that are kept, best first.
    """
    order = sorted(range(len(passages)), key=lambda at: (passages[at].blank, -logits[at]))
    ranked = [passages[at] for at in order]
    if threshold is not None:
        ranked = [passage for passage in ranked if not passage.blank and passage.score >= threshold]
    return ranked[:top_n]


def sigmoid(logit: float) -> float:
    """Return the sigmoid of a logit, between 0 and 1, in double precision and without overflow."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    exponential = math.exp(logit)
    return exponential / (1.0 + exponential)
