"""Rows that are scored together, where each malformed row gets its own error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import (
    InputError,
    InputTypeError,
    NonFiniteScoreError,
    QueueFullError,
    RerankError,
)
from bge_rerank_integrations.ranking import RankedPassage, Ranking
from bge_rerank_integrations.ray.rows import rank_rows, score_rows
from tests.support.tolerances import LOGIT_TOLERANCE

torch = pytest.importorskip("torch")
QUERY = "what is a panda?"
CANARY = "CANARY"


class Faulty:
    """Scores a passage by its length. The score of a passage that contains "nan" is not finite."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.error: RerankError | None = None

    def rank(
        self, query: str, passages: Sequence[str], top_n: int | None, threshold: float | None
    ) -> Ranking:
        return self.rank_many([(query, passages)], top_n, threshold)[0]

    def rank_many(
        self, requests: Iterable[tuple[str, Sequence[str]]], top_n: int | None, _: float | None
    ) -> list[Ranking]:
        requests = list(requests)
        self.score([(query, text) for query, texts in requests for text in texts])
        return [
            Ranking([RankedPassage(index, float(len(text))) for index, text in enumerate(texts)][:top_n])
            for _, texts in requests
        ]

    def score(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        texts = [text for _, text in pairs]
        for index, text in enumerate(texts):
            if "nan" in text:
                raise NonFiniteScoreError(f"the model's score of pair {index} is not finite", index=index)
        return [float(len(text)) for text in texts]


def test_rows_are_ranked_as_by_the_scorer(scorer: Scorer, texts: list[str]) -> None:
    rows = [(QUERY, texts[at : at + 3]) for at in range(0, 12, 3)]
    for (query, passages), ranking in zip(rows, rank_rows(scorer, rows, 2, None), strict=True):
        expected = scorer.rank(query, passages, 2)
        assert isinstance(ranking, Ranking)
        assert [each.index for each in ranking] == [each.index for each in expected]
        assert [each.score for each in ranking] == pytest.approx(
            [each.score for each in expected], abs=LOGIT_TOLERANCE[torch.float32]
        )


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ((None, [CANARY]), InputTypeError, "the query must be a string, not NoneType"),
        ((" \n", [CANARY]), InputError, "the query is blank"),
        ((QUERY, None), InputTypeError, "passages must be a sequence of strings, not NoneType"),
        ((QUERY, CANARY), InputTypeError, "passages must be a sequence of strings, not str"),
        ((QUERY, [CANARY, None]), InputTypeError, "passage 1 must be a string, not NoneType"),
        ((QUERY, ["good", 5, CANARY]), InputTypeError, "passage 1 must be a string, not int"),
        ((QUERY, ["good", f"{CANARY} nan"]), NonFiniteScoreError, "is not finite"),
    ],
)
@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_malformed_request_leaves_the_others_alone(
    row: tuple[Any, Any], kind: type[RerankError], message: str, position: int
) -> None:
    rows: list[tuple[object, object]] = [(QUERY, ["a" * length]) for length in range(1, 7)]
    rows.insert(position, row)
    scorer: Any = Faulty()
    results = rank_rows(scorer, rows, None, None)
    error = results.pop(position)
    assert isinstance(error, kind)
    assert message in str(error)
    assert CANARY not in str(error)
    assert error.__traceback__ is None
    assert results == [[RankedPassage(0, float(length))] for length in range(1, 7)]


def test_a_refused_blank_passage_is_an_error_of_its_row(checkpoint: Any) -> None:
    with Scorer(checkpoint, device="cpu", blank_passages="refuse") as scorer:
        first, second = rank_rows(scorer, [(QUERY, ["a", " "]), (QUERY, ["a"])], None, None)
    assert isinstance(first, InputError)
    assert first.index == 1
    assert isinstance(second, Ranking)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ((None, CANARY), InputTypeError, "the query must be a string, not NoneType"),
        ((CANARY, 5), InputTypeError, "the passage must be a string, not int"),
        ((CANARY, f"{CANARY} nan"), NonFiniteScoreError, "the model's score is not finite"),
    ],
)
def test_a_malformed_pair_leaves_the_others_alone(
    row: tuple[Any, Any], kind: type[RerankError], message: str
) -> None:
    scorer: Any = Faulty()
    first, error, last = score_rows(scorer, [("q", "a"), row, ("q", "bb")])
    assert (first, last) == (1.0, 2.0)
    assert isinstance(error, kind)
    assert str(error) == message


def test_all_rows_can_be_malformed() -> None:
    scorer: Any = Faulty()
    assert all(isinstance(each, NonFiniteScoreError) for each in score_rows(scorer, [("q", "nan")] * 5))
    assert score_rows(scorer, []) == []
    assert rank_rows(scorer, [], None, None) == []


def test_good_rows_take_one_call() -> None:
    scorer: Any = Faulty()
    score_rows(scorer, [("q", "a")] * 100)
    assert scorer.num_calls == 1


def test_an_error_of_the_scorer_is_raised() -> None:
    scorer: Any = Faulty()
    scorer.error = QueueFullError("full")
    with pytest.raises(QueueFullError):
        score_rows(scorer, [("q", "a"), ("q", "b")])
