"""The results of both framework adapters: scores, marks in metadata, figures for traces."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from numbers import Number, Real
from typing import Any, Final

import numpy as np

from bge_rerank_integrations.errors import ConfigError
from bge_rerank_integrations.ranking import RankedPassage, Ranking

TRUNCATED_KEY: Final = "rerank_truncated"
BLANK_KEY: Final = "rerank_blank"
MARKS: Final = (TRUNCATED_KEY, BLANK_KEY)
"""Metadata keys that mark a document that the model did not read completely."""
RETRIEVAL_RANK_KEY: Final = "retrieval_rank"
RETRIEVAL_SCORE_KEY: Final = "retrieval_score"
RETRIEVAL_KEYS: Final = (RETRIEVAL_RANK_KEY, RETRIEVAL_SCORE_KEY)
"""Metadata keys that keep the result of the retriever."""
# What only a scorer of this package counts.
_OWN_COUNTS: Final = ("num_tokens", "num_truncated", "num_truncated_queries", "num_blank")


def type_of(value: object) -> str:
    """Return the name of a value's type for an error message, with its module if it is not built in.

    Both frameworks have a class `Document`.
    """
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def is_missing(value: Any) -> bool:
    """Return whether a value of metadata stands for no value: None, NaN, or an empty cell of pandas."""
    # pandas represents an empty cell as NaN, NaT or NA, in a type that depends on the column. NaT is a date.
    if value is None or type(value).__name__ == "NAType":
        return True
    try:
        return isinstance(value, Number | date | np.datetime64 | np.timedelta64) and bool(value != value)
    except ArithmeticError:  # a signaling NaN of `decimal`
        return True


def as_score(value: Any) -> float | None:
    """Return the score of a retriever as a Python float. Return None if the value is no real number, or NaN.

    Retrievers and other rerankers may give a NumPy float, which JSON and the checkpoints of LangGraph lack.
    """
    # NumPy counts a duration as an integer.
    if not isinstance(value, Real | Decimal) or isinstance(value, bool | np.timedelta64) or is_missing(value):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def check_ranking(
    ranked: Sequence[RankedPassage], num_passages: int, scorer: object
) -> Sequence[RankedPassage]:
    """Return the ranking of a scorer that is not of this package.

    Args:
        ranked: What the scorer returned.
        num_passages: Number of passages that it ranked.
        scorer: The scorer.

    Raises:
        ConfigError: The scorer returned something else than passages with an index and a score, an index that
            is out of range or comes twice, or NaN.
    """
    name = type(scorer).__name__
    try:
        ranked = ranked if isinstance(ranked, Sequence) else list(ranked)
        results = [(operator.index(passage.index), float(passage.score)) for passage in ranked]
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise ConfigError(
            f"the scorer {name} must return RankedPassage objects, each with an integer index and a score"
        ) from None
    seen: set[int] = set()
    for index, score in results:
        if not 0 <= index < num_passages or index in seen:
            again = " twice" if index in seen else ""
            raise ConfigError(f"the scorer {name} returned index {index}{again} for {num_passages} passages")
        if score != score:
            raise ConfigError(f"the scorer {name} returned NaN for passage {index}")
        seen.add(index)
    return ranked


def marks_of(passage: RankedPassage) -> dict[str, bool]:
    """Return the metadata that `mark_unread` adds. It is empty if the scorer sets no flags."""
    flags = {
        TRUNCATED_KEY: getattr(passage, "truncated", False),
        BLANK_KEY: getattr(passage, "blank", False),
    }
    return {key: True for key, value in flags.items() if value}


def summarize(ranked: Sequence[RankedPassage], num_pairs: int) -> dict[str, int | None]:
    """Return the figures of a ranking for traces. Figures that the scorer does not give are None."""
    counts = vars(ranked) if isinstance(ranked, Ranking) else {}
    own = {name: counts.get(name) for name in _OWN_COUNTS}
    return {"num_pairs": num_pairs, **own, "num_returned": len(ranked)}


def summarize_all(
    rankings: Sequence[Sequence[RankedPassage]], num_pairs: Sequence[int]
) -> dict[str, int | None]:
    """Return the summed figures of several rankings. A sum is None if a ranking does not give that figure."""
    figures = [summarize(ranked, number) for ranked, number in zip(rankings, num_pairs, strict=True)]
    totals: dict[str, int | None] = {}
    for name in summarize((), 0):
        values = [each[name] for each in figures]
        totals[name] = None if None in values else sum(filter(None, values))
    return totals
