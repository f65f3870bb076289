"""Properties of the batches that `plan_batches` returns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_integrations.engine.batch_planning import plan_batches


@given(st.lists(st.integers(1, 600)), st.integers(1, 2000))
def test_batches_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1


@given(st.lists(st.integers(1, 600)), st.integers(1, 2000))
def test_no_batch_has_room_for_the_first_sequence_of_the_next(lengths: list[int], budget: int) -> None:
    totals = [sum(lengths[index] for index in batch) for batch in plan_batches(lengths, budget)]
    firsts = [lengths[batch[0]] for batch in plan_batches(lengths, budget)]
    assert all(total + first > budget for total, first in zip(totals, firsts[1:], strict=False))


@given(st.lists(st.integers(1, 5)))
def test_sequences_are_planned_longest_first_and_equal_lengths_in_input_order(lengths: list[int]) -> None:
    order = [index for batch in plan_batches(lengths, 7) for index in batch]
    assert order == sorted(order, key=lambda index: (-lengths[index], index))


def test_no_sequences_give_no_batches() -> None:
    assert plan_batches([], 10) == []
