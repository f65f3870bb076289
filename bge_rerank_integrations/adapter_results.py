"""The results of both framework adapters: copies of their objects, marks in metadata, figures for traces."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from bge_rerank_integrations.ranking import RankedPassage, Ranking

Model = TypeVar("Model", bound=BaseModel)

TRUNCATED_KEY: Final = "rerank_truncated"
BLANK_KEY: Final = "rerank_blank"
MARKS: Final = (TRUNCATED_KEY, BLANK_KEY)
"""Metadata keys that mark a document that the model did not read completely."""


def independent_copy(model: Model, *, shared: Iterable[str] = ()) -> Model:
    """Return a deep copy of a pydantic model. Values that cannot be copied are shared with the original.

    Args:
        model: The model to copy.
        shared: Names of fields whose values are shared instead of copied.

    Returns:
        The copy.
    """
    copied = model.model_copy()
    for name in copied.__dict__.keys() - set(shared):
        copied.__dict__[name] = _copy_value(copied.__dict__[name])
    return copied


def _copy_value(value: Any) -> Any:
    if type(value) is list and set(map(type, value)) <= {int, float, str}:
        return value.copy()  # for an embedding, `deepcopy` is a hundred times slower
    try:
        return copy.deepcopy(value)
    except Exception:
        return {key: _copy_value(each) for key, each in value.items()} if isinstance(value, dict) else value


def marks_of(passage: RankedPassage) -> dict[str, bool]:
    """Return the metadata that `mark_unread` adds. It is empty if the scorer sets no flags."""
    flags = {
        TRUNCATED_KEY: getattr(passage, "truncated", False),
        BLANK_KEY: getattr(passage, "blank", False),
    }
    return {key: True for key, value in flags.items() if value}


def summarize(ranked: Sequence[RankedPassage], num_pairs: int) -> dict[str, int | None]:
    """Return the figures of a ranking for traces. Figures that the scorer does not give are None."""
    own = ranked if isinstance(ranked, Ranking) else None
    return {
        "num_pairs": num_pairs,
        "num_tokens": None if own is None else own.num_tokens,
        "num_truncated": None if own is None else own.num_truncated,
        "num_truncated_queries": None if own is None else own.num_truncated_queries,
        "num_blank": None if own is None else own.num_blank,
        "num_returned": len(ranked),
    }


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
