"""Scoring many rows in one call, where a malformed row gets an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from bge_rerank_integrations.errors import InputError, InputTypeError, NonFiniteScoreError, RerankError
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.validation import check_passages, check_query

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# These errors concern one row. Every other error concerns the scorer, so it ends the whole call.
_ERRORS_OF_A_ROW = (InputError, NonFiniteScoreError)


def rank_rows(
    scorer: Scorer, rows: Sequence[tuple[object, object]], top_n: int | None, threshold: float | None
) -> list[Ranking | RerankError]:
    """Rank the passages of each row.

    Args:
        scorer: The scorer.
        rows: (query, passages) of each row, of any type.
        top_n: As in `Scorer.rank`, for each row.
        threshold: As in `Scorer.rank`, for each row.

    Returns:
        For each row, in order, its ranking or the error that says what is wrong with the row.

    Raises:
        RerankError: The scorer cannot be used. The error does not concern a single row.
    """
    checked = [_outcome(_check_request, row) for row in rows]
    return _score_checked(
        checked,
        lambda requests: scorer.rank_many(requests, top_n, threshold),
        lambda request: scorer.rank(*request, top_n, threshold),
    )


def score_rows(scorer: Scorer, rows: Sequence[tuple[object, object]]) -> list[float | RerankError]:
    """Score each row.

    Args:
        scorer: The scorer.
        rows: (query, passage) of each row, of any type.

    Returns:
        For each row, in order, its score or the error that says what is wrong with the row.

    Raises:
        RerankError: The scorer cannot be used. The error does not concern a single row.
    """
    return _score_checked(
        [_outcome(_check_pair, row) for row in rows], scorer.score, partial(_score_one, scorer)
    )


def _check_request(row: tuple[object, object]) -> tuple[str, list[str]]:
    return check_query(row[0]), check_passages(row[1])


def _check_pair(row: tuple[object, object]) -> tuple[str, str]:
    for name, text in zip(("query", "passage"), row, strict=True):
        if not isinstance(text, str):
            raise InputTypeError(f"the {name} must be a string, not {type(text).__name__}")
    query, passage = row
    return str(query), str(passage)


def _score_one(scorer: Scorer, pair: tuple[str, str]) -> float:
    try:
        return scorer.score([pair])[0]
    except NonFiniteScoreError:
        raise NonFiniteScoreError("the model's score is not finite") from None


def _score_checked(
    checked: Sequence[ItemT | RerankError],
    score_all: Callable[[list[ItemT]], Sequence[ResultT]],
    score_one: Callable[[ItemT], ResultT],
) -> list[ResultT | RerankError]:
    """Score the valid items together, and keep the errors of the others in their places."""
    valid = [item for item in checked if not isinstance(item, RerankError)]
    outcomes = iter(_score_valid(valid, score_all, score_one))
    return [item if isinstance(item, RerankError) else next(outcomes) for item in checked]


def _score_valid(
    items: list[ItemT],
    score_all: Callable[[list[ItemT]], Sequence[ResultT]],
    score_one: Callable[[ItemT], ResultT],
) -> list[ResultT | RerankError]:
    """Score items together. If one of them fails, halve the list until the error has its own item."""
    if not items:
        return []
    if len(items) == 1:
        return [_outcome(score_one, items[0])]
    try:
        return list(score_all(items))
    except _ERRORS_OF_A_ROW:
        middle = len(items) // 2
        return [
            *_score_valid(items[:middle], score_all, score_one),
            *_score_valid(items[middle:], score_all, score_one),
        ]


def _outcome(call: Callable[[ItemT], ResultT], item: ItemT) -> ResultT | RerankError:
    try:
        return call(item)
    except _ERRORS_OF_A_ROW as error:
        # The traceback would keep the row's texts alive.
        return error.with_traceback(None)
