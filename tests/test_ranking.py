from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_integrations import RankedPassage, Ranking
from bge_rerank_integrations.errors import InputError, InputTypeError
from bge_rerank_integrations.ranking import BLANK_LOGIT, check_threshold, check_top_n, select, sigmoid

SCORES = st.lists(st.floats(-20, 20) | st.sampled_from([0.0, -0.0, 1.0]))


def passages(scores: list[float]) -> list[RankedPassage]:
    return [RankedPassage(index, score) for index, score in enumerate(scores)]


@given(SCORES)
def test_best_first_and_ties_keep_input_order(scores: list[float]) -> None:
    ranked = select(passages(scores), scores, None, None)
    assert [p.index for p in ranked] == sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@given(SCORES, st.integers(0, 10) | st.none(), st.floats(-20, 20) | st.none())
def test_top_n_and_an_inclusive_threshold(
    scores: list[float], top_n: int | None, threshold: float | None
) -> None:
    everything = select(passages(scores), scores, None, None)
    kept = [p for p in everything if threshold is None or p.score >= threshold]
    assert select(passages(scores), scores, top_n, threshold) == kept[:top_n]


@given(st.lists(st.floats(-800, 800), max_size=12), st.integers(0, 14) | st.none())
def test_the_order_is_that_of_the_logits_where_the_sigmoid_rounds_them_together(
    logits: list[float], top_n: int | None
) -> None:
    logits = [*logits, 40.0, 50.0, 45.0]
    ranked = select(passages([sigmoid(logit) for logit in logits]), logits, top_n, None)
    assert [p.index for p in ranked] == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_n]


@pytest.mark.parametrize("lowest", [0.0, BLANK_LOGIT, -1e9])
def test_blank_passages_come_last_in_input_order_and_pass_no_threshold(lowest: float) -> None:
    given_passages = [RankedPassage(index, lowest, blank=index in (0, 2)) for index in range(4)]
    ranked = select(given_passages, [lowest] * 4, None, None)
    assert [p.index for p in ranked] == [1, 3, 0, 2]
    assert [p.index for p in select(given_passages, [lowest] * 4, 3, None)] == [1, 3, 0]
    assert [p.index for p in select(given_passages, [lowest] * 4, None, -1e300)] == [1, 3]


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
    ("threshold", "error"),
    [
        (math.nan, InputError),
        (math.inf, InputError),
        (-math.inf, InputError),
        (10**400, InputError),
        ("0.5", InputTypeError),
        (True, InputTypeError),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_bad_threshold(threshold: Any, error: type[Exception], normalize: bool) -> None:
    with pytest.raises(error, match="threshold"):
        check_threshold(threshold, normalize=normalize)


@pytest.mark.parametrize(
    ("threshold", "effect"), [(0, "everything"), (-2, "everything"), (1.5, "nothing"), (50, "nothing")]
)
def test_a_threshold_off_the_scale_names_both_scales(threshold: float, effect: str) -> None:
    check_threshold(threshold, normalize=False)
    with pytest.raises(InputError, match=f"keeps {effect}.*normalize=True.*0 and 1.*normalize=False.*-11"):
        check_threshold(threshold, normalize=True)


@pytest.mark.parametrize("threshold", [None, 1, 1.0, 0.5, 1e-300])
def test_a_threshold_on_the_scale_is_accepted(threshold: float | None) -> None:
    check_threshold(threshold, normalize=True)


def test_a_ranking_is_a_list_that_pickles_with_its_figures() -> None:
    ranking = Ranking(
        [RankedPassage(0, 1.0)],
        num_pairs=2,
        num_tokens=30,
        num_truncated=1,
        num_truncated_queries=1,
        num_blank=3,
    )
    again = pickle.loads(pickle.dumps(ranking))
    assert again == ranking == [RankedPassage(0, 1.0, truncated=False, windows=1)]
    assert (again.num_pairs, again.num_tokens, again.num_truncated) == (2, 30, 1)
    assert (again.num_truncated_queries, again.num_blank) == (1, 3)
