from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_integrations import RankedPassage, Ranking
from bge_rerank_integrations.errors import InputError, InputTypeError
from bge_rerank_integrations.ranking import check_threshold, check_top_n, select, sigmoid

SCORES = st.lists(st.floats(-20, 20) | st.sampled_from([0.0, -0.0, 1.0]))


def passages(scores: list[float]) -> list[RankedPassage]:
    return [RankedPassage(index, score) for index, score in enumerate(scores)]


@given(SCORES)
def test_best_first_and_ties_keep_input_order(scores: list[float]) -> None:
    ranked = select(passages(scores), None, None)
    assert [p.index for p in ranked] == sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@given(SCORES, st.integers(0, 10) | st.none(), st.floats(-20, 20) | st.none())
def test_top_n_and_an_inclusive_threshold(
    scores: list[float], top_n: int | None, threshold: float | None
) -> None:
    everything = select(passages(scores), None, None)
    kept = [p for p in everything if threshold is None or p.score >= threshold]
    assert select(passages(scores), top_n, threshold) == kept[:top_n]


@given(st.floats(-800, 800))
def test_sigmoid_never_overflows(logit: float) -> None:
    value = sigmoid(logit)
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(1.0 - sigmoid(-logit), abs=1e-12)
    assert value == pytest.approx(0.5 * (1.0 + math.tanh(logit / 2)), abs=1e-12)


@pytest.mark.parametrize(
    ("top_n", "error"), [(-1, InputError), (1.0, InputTypeError), (True, InputTypeError)]
)
def test_bad_top_n(top_n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="top_n"):
        check_top_n(top_n)


@pytest.mark.parametrize(
    ("threshold", "error"), [(math.nan, InputError), ("0.5", InputTypeError), (True, InputTypeError)]
)
def test_bad_threshold(threshold: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="threshold"):
        check_threshold(threshold)


def test_a_ranking_is_a_list_that_pickles_with_its_figures() -> None:
    ranking = Ranking([RankedPassage(0, 1.0)], num_pairs=2, num_tokens=30, num_truncated=1)
    again = pickle.loads(pickle.dumps(ranking))
    assert again == ranking == [RankedPassage(0, 1.0, truncated=False, windows=1)]
    assert (again.num_pairs, again.num_tokens, again.num_truncated) == (2, 30, 1)
