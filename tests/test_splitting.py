"""Requests that are divided give the rankings and the errors of the undivided call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_integrations import RankedPassage, Ranking
from bge_rerank_integrations.errors import InputError, InputTypeError, NonFiniteScoreError
from bge_rerank_integrations.ranking import Selection, select, sigmoid
from bge_rerank_integrations.splitting import (
    Fragment,
    error_of_call,
    merge_rankings,
    score_error_of_call,
    split_requests,
)

REQUESTS = st.lists(st.tuples(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=8)), max_size=6)
PAIR = [Fragment(3, 0, "q", ["a", "b"]), Fragment(4, 10, "r", ["c", "d", "e"])]


@given(REQUESTS, st.integers(1, 10), st.integers(1, 20))
def test_no_part_is_too_large_and_no_passage_is_lost(
    requests: list[tuple[str, list[str]]], max_pairs: int, max_characters: int
) -> None:
    parts = list(split_requests(requests, max_pairs=max_pairs, max_characters=max_characters))
    found: list[list[str]] = [[] for _ in requests]
    for part in parts:
        num_pairs = sum(len(fragment.passages) for fragment in part)
        num_characters = sum(len(each.query) + sum(map(len, each.passages)) for each in part)
        assert 1 <= num_pairs <= max_pairs
        assert num_characters <= max_characters or num_pairs == 1
        for fragment in part:
            assert fragment.query == requests[fragment.request][0]
            assert fragment.start == len(found[fragment.request])
            found[fragment.request] += fragment.passages
    assert found == [passages for _, passages in requests]


@given(
    st.lists(st.lists(st.integers(-3, 3).map(float), max_size=8), max_size=4),
    st.integers(1, 5),
    st.none() | st.integers(0, 5),
    st.booleans(),
)
def test_merged_rankings_are_those_of_the_undivided_call(
    logits: list[list[float]], max_pairs: int, top_n: int | None, normalize: bool
) -> None:
    def rank(scores: list[float], selection: Selection) -> Ranking:
        values = [sigmoid(score) if selection.normalize else score for score in scores]
        passages = [RankedPassage(index, value) for index, value in enumerate(values)]
        chosen = select(passages, scores, selection.top_n, selection.threshold)
        return Ranking(chosen, num_pairs=len(scores), num_tokens=7 * len(scores), num_truncated_queries=1)

    selection = Selection(top_n, 0.4, normalize)
    requests = [("q", [str(logit) for logit in each]) for each in logits]
    ranked = [
        (fragment, rank([float(text) for text in fragment.passages], Selection(top_n, None, normalize=False)))
        for part in split_requests(requests, max_pairs=max_pairs, max_characters=1000)
        for fragment in part
    ]
    for merged, each in zip(merge_rankings(len(requests), ranked, selection), logits, strict=True):
        expected = rank(each, selection)
        assert merged == expected
        if each:
            assert vars(merged) == vars(expected)


@pytest.mark.parametrize(
    ("part", "message", "index", "names_request", "expected", "expected_index"),
    [
        # A call for one request names the passage, or nothing.
        (PAIR[1:], "passage 2 is blank", 2, False, "passage 12 is blank", 12),
        (PAIR[1:], "the query is blank", None, False, "the query is blank", None),
        (PAIR[1:], "passage 2 is blank", 2, True, "request 4: passage 12 is blank", 4),
        (PAIR[1:], "the query is blank", None, True, "request 4: the query is blank", 4),
        # A call for several requests names the request.
        (PAIR, "request 1: passage 2 is blank", 1, True, "request 4: passage 12 is blank", 4),
        (PAIR, "request 0: the query is blank", 0, True, "request 3: the query is blank", 3),
        # An error without a valid index belongs to no request.
        (PAIR, "something is wrong", None, True, "something is wrong", None),
        (PAIR, "something is wrong", 2, True, "something is wrong", 2),
        (PAIR, "something is wrong", -1, True, "something is wrong", -1),
    ],
)
def test_the_error_of_a_part_gets_the_numbers_of_the_undivided_call(
    part: list[Fragment],
    message: str,
    index: int | None,
    names_request: bool,
    expected: str,
    expected_index: int | None,
) -> None:
    for kind in (InputError, InputTypeError):
        error = error_of_call(kind(message, index=index), part, names_request=names_request)
        assert (type(error), str(error), error.index) == (kind, expected, expected_index)


@pytest.mark.parametrize(("index", "expected"), [(3, 103), (0, 100), (None, 100)])
def test_a_score_that_is_not_finite_is_counted_over_all_parts(index: int | None, expected: int) -> None:
    error = score_error_of_call(NonFiniteScoreError("the score of a pair", index=index), 100)
    assert (str(error), error.index) == (f"the model's score of pair {expected} is not finite", expected)
