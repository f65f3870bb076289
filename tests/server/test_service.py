"""Admission, splitting and the drain, without HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from bge_rerank_integrations.errors import InputTypeError, NonFiniteScoreError, QueueFullError
from bge_rerank_integrations.ranking import RankedPassage, Ranking, sigmoid
from bge_rerank_integrations.server.dialects.dialect import Work
from bge_rerank_integrations.server.refusal import Refusal
from bge_rerank_integrations.server.service import Service
from tests.support.servers import PATIENCE_S, HeldScorer, wait_until


def service_of(scorer: Any) -> Service:
    return Service(scorer)


def work_of(*passages: str, **options: Any) -> Work:
    return Work(requests=[("q", list(passages))], raw_scores=True, **options)


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


async def let_others_run() -> None:
    """Let all other tasks run until they wait for something."""
    for _ in range(100):
        await asyncio.sleep(0)


def rank_next_part_at_once(scorer: HeldScorer, scores: list[float]) -> None:
    rank = scorer.arank_many

    async def rank_once(requests: Any) -> list[Ranking]:
        scorer.arank_many = rank  # type: ignore[method-assign]
        return [Ranking([RankedPassage(index, score) for index, score in enumerate(scores)])]

    scorer.arank_many = rank_once  # type: ignore[method-assign]


async def test_raw_and_normalized_scores_and_top_n() -> None:
    service = service_of(HeldScorer(is_held=False))
    (ranking,) = await service.rank(Work(requests=[("q", ["1 a", "3 b", "2 c"])], top_n=2))
    assert [(passage.index, passage.score) for passage in ranking] == [(1, sigmoid(3)), (2, sigmoid(2))]
    (ranking,) = await service.rank(work_of("1 a", "3 b", "2 c"))
    assert [(passage.index, passage.score) for passage in ranking] == [(1, 3), (2, 2), (0, 1)]
    assert (ranking.num_pairs, ranking.num_tokens) == (3, 6)
    (ranking,) = await service.rank(Work(requests=[("q", ["800", "900"])]))  # both are 1.0 as a sigmoid
    assert [(passage.index, passage.score) for passage in ranking] == [(1, 1.0), (0, 1.0)]
    assert await service.rank(Work(requests=[])) == []
    assert await service.rank(work_of()) == [[]]


async def test_only_scores_returns_the_score_of_every_pair() -> None:
    work = Work(requests=[("q", ["1", "3"]), ("r", ["2"])], raw_scores=True, only_scores=True)
    first, second = await service_of(HeldScorer(is_held=False)).rank(work)
    assert [(passage.index, passage.score) for passage in [*first, *second]] == [(1, 3), (0, 1), (0, 2)]


async def test_many_passages_are_split_and_merged() -> None:
    scorer = HeldScorer(is_held=False)
    requests = [("q", [str(number) for number in range(1300)]), ("r", []), ("s", ["5", "7"])]
    first, empty, last = await service_of(scorer).rank(Work(requests=requests, raw_scores=True, top_n=1000))
    # `HeldScorer` gives no score above 1000.
    assert [passage.index for passage in first] == [*range(1000, 1300), *reversed(range(300, 1000))]
    assert first.num_pairs == 1300
    assert (empty, [passage.index for passage in last]) == ([], [1, 0])
    assert scorer.sizes == [512, 512, 278]


async def test_a_full_queue_refuses_at_once() -> None:
    scorer = HeldScorer(max_queued_tokens=100)
    service = service_of(scorer)
    first = asyncio.ensure_future(service.rank(work_of("1 " * 60)))
    await until(lambda: scorer.num_calls == 1)
    with pytest.raises(QueueFullError):
        await service.rank(work_of("1 " * 50))
    second = asyncio.ensure_future(service.rank(work_of("2 " * 30)))  # there is room for this one
    await until(lambda: scorer.num_calls == 2)
    num_asked = scorer.num_asked
    with pytest.raises(QueueFullError, match="90 tokens are waiting; max_queued_tokens is 100"):
        await service.rank(work_of("3 " * 50))
    assert scorer.num_asked == num_asked  # so many words cannot fit, which is plain before they are encoded
    scorer.is_held = False
    assert [ranking[0].score for ranking in [*await first, *await second]] == [1, 2]


async def test_a_queue_that_another_user_of_the_scorer_filled_is_no_reason_for_413() -> None:
    """The queue may be empty again before the service looks at it."""
    scorer = HeldScorer(is_held=False, max_queued_tokens=100)
    scorer.error = QueueFullError("full")
    with pytest.raises(QueueFullError):
        await service_of(scorer).rank(work_of("1 " * 50))
    scorer.error = QueueFullError("full", never_fits=True)
    with pytest.raises(Refusal) as caught:
        await service_of(scorer).rank(work_of("1 " * 50))
    assert caught.value.status == 413


async def test_a_repeated_passage_counts_once_when_room_is_checked() -> None:
    scorer = HeldScorer(max_queued_tokens=1000)
    service = service_of(scorer)
    first = asyncio.ensure_future(service.rank(work_of("1 " * 900)))
    await until(lambda: scorer.num_calls == 1)
    num_asked = scorer.num_asked
    with pytest.raises(QueueFullError):  # of the scorer, which knows the number of tokens
        await service.rank(work_of(*["3 " * 21] * 7))
    assert scorer.num_asked == num_asked + 1
    scorer.is_held = False
    assert len(await first) == 1


async def test_a_request_larger_than_the_queue_is_split_so_that_it_fits() -> None:
    scorer = HeldScorer(is_held=False, max_queued_tokens=256)
    (ranking,) = await service_of(scorer).rank(work_of(*[f"{number} " * 50 for number in range(20)]))
    assert [passage.index for passage in ranking] == list(reversed(range(20)))
    assert max(scorer.sizes) == 2


async def test_later_parts_wait_until_other_requests_leave_the_queue() -> None:
    scorer = HeldScorer(max_queued_tokens=256)
    service = service_of(scorer)
    long = asyncio.ensure_future(service.rank(work_of(*[f"{number} " * 50 for number in range(8)])))
    await until(lambda: scorer.num_calls == 1)
    others = [asyncio.ensure_future(service.rank(work_of("3 " * 50))) for _ in range(3)]
    await until(lambda: scorer.num_calls == 4)
    scorer.is_held = False
    (ranking,) = await asyncio.wait_for(long, PATIENCE_S)
    assert [passage.index for passage in ranking] == list(reversed(range(8)))
    await asyncio.gather(*others)


async def test_a_request_that_fills_the_queue_exactly_is_accepted() -> None:
    scorer = HeldScorer(max_queued_tokens=256)
    service = service_of(scorer)
    first = asyncio.ensure_future(service.rank(work_of("1 " * 224)))
    await until(lambda: scorer.num_calls == 1)
    # With 4 special tokens, each passage has 16 tokens.
    second = asyncio.ensure_future(service.rank(work_of("2 " * 12, "3 " * 12)))
    await until(lambda: scorer.num_calls == 2 or second.done())
    scorer.is_held = False
    assert [passage.score for passage in (await second)[0]] == [3, 2]
    await first


async def test_two_parts_of_a_request_run_at_once() -> None:
    """The second part starts when the first one has ended."""
    scorer = HeldScorer(max_queued_tokens=256)
    service = service_of(scorer)
    short = asyncio.ensure_future(service.rank(work_of("2", "3", "1")))
    await let_others_run()
    assert scorer.sizes == [2]
    scorer.is_held = False
    await asyncio.wait_for(short, PATIENCE_S)

    scorer.is_held, scorer.sizes = True, []
    rank_next_part_at_once(scorer, [8.0, 7.0])
    long = asyncio.ensure_future(service.rank(work_of("8", "7", "6", "5", "4", "3", "2")))
    await let_others_run()
    assert scorer.sizes == [2, 2]
    scorer.is_held = False
    (ranking,) = await asyncio.wait_for(long, PATIENCE_S)
    assert [passage.score for passage in ranking] == [8, 7, 6, 5, 4, 3, 2]


async def test_work_that_did_not_fit_beside_other_work_is_not_too_long() -> None:
    scorer = HeldScorer(is_held=False, max_queued_tokens=40)
    service = service_of(scorer)
    rank, is_asked, may_refuse = scorer.arank, asyncio.Event(), asyncio.Event()

    async def rank_or_refuse(query: str, passages: Any) -> Ranking:
        if list(passages) == ["refused"]:
            is_asked.set()
            await may_refuse.wait()
            raise QueueFullError("full")
        return await rank(query, passages)

    scorer.arank = rank_or_refuse  # type: ignore[method-assign]
    refused = asyncio.ensure_future(service.rank(work_of("refused")))
    await is_asked.wait()
    await service.rank(work_of("1"))  # it may have filled the queue when the other one was refused
    may_refuse.set()
    with pytest.raises(QueueFullError):
        await refused


async def test_work_that_can_never_fit_is_refused_as_too_long() -> None:
    scorer = HeldScorer(is_held=False, max_queued_tokens=40)
    with pytest.raises(Refusal) as caught:
        await service_of(scorer).rank(work_of("1 " * 41))
    assert (caught.value.status, caught.value.type) == (413, "InputTooLong")


async def test_a_cancelled_request_cancels_its_parts() -> None:
    scorer = HeldScorer()
    task = asyncio.ensure_future(service_of(scorer).rank(work_of("1")))
    await until(lambda: scorer.num_calls == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: scorer.num_cancelled == 1)


async def test_a_request_that_forbids_truncation_is_refused() -> None:
    service = service_of(HeldScorer(is_held=False))
    with pytest.raises(Refusal) as caught:
        await service.rank(work_of("1 long", "2", refuse_truncated=True))
    assert (caught.value.status, caught.value.type) == (400, "InputTooLong")
    assert await service.rank(work_of("1", "2", refuse_truncated=True))


async def test_the_index_of_a_score_that_is_not_finite_counts_all_parts() -> None:
    scorer = HeldScorer(is_held=False, max_queued_tokens=256)
    service = service_of(scorer)

    async def fail_at_the_second(query: str, passages: Any) -> Any:
        if scorer.sizes:
            raise NonFiniteScoreError("bad", index=1)
        return await HeldScorer.arank(scorer, query, passages)

    scorer.arank = fail_at_the_second  # type: ignore[method-assign]
    with pytest.raises(NonFiniteScoreError, match="pair 3") as caught:
        await service.rank(work_of("1", "2", "3", "4"))
    assert caught.value.index == 3


async def test_an_input_error_in_a_later_part_names_the_request() -> None:
    scorer = HeldScorer(is_held=False, max_queued_tokens=256)
    service = service_of(scorer)

    async def fail_at_the_second(query: str, passages: Any) -> Any:
        if query == "r":
            raise InputTypeError("passage 1 is blank", index=1)
        return await HeldScorer.arank(scorer, query, passages)

    scorer.arank = fail_at_the_second  # type: ignore[method-assign]
    with pytest.raises(InputTypeError, match=r"^request 1: passage 1 is blank$") as caught:
        await service.rank(Work(requests=[("q", ["1", "2"]), ("r", ["3", " "])]))
    assert caught.value.index == 1
    with pytest.raises(InputTypeError, match=r"^passage 1 is blank$"):
        await service.rank(Work(requests=[("r", ["3", " "])]))


async def test_the_drain_finishes_accepted_requests_and_refuses_new_ones() -> None:
    scorer = HeldScorer()
    service = service_of(scorer)
    assert service.is_ready
    accepted = asyncio.ensure_future(service.rank(work_of("1")))
    await until(lambda: scorer.num_calls == 1)
    draining = asyncio.ensure_future(service.drain(PATIENCE_S))
    await asyncio.sleep(0)
    assert (service.is_ready, service.is_live) == (False, True)
    with pytest.raises(Refusal) as caught:
        await service.rank(work_of("2"))
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
    scorer.is_held = False
    assert await draining == 0
    assert [passage.score for passage in (await accepted)[0]] == [1]


async def test_the_drain_cancels_requests_that_are_not_finished_in_time() -> None:
    scorer = HeldScorer()
    service = service_of(scorer)
    accepted = asyncio.ensure_future(service.rank(work_of("1")))
    await until(lambda: scorer.num_calls == 1)
    assert await service.drain(0.01) == 1
    with pytest.raises(Refusal, match="shut down"):
        await accepted
    assert scorer.num_cancelled == 1


async def test_a_body_that_begins_to_arrive_after_the_drain_began_is_refused() -> None:
    service = service_of(HeldScorer())
    service.begin_drain()

    async def receive() -> bytes:
        await asyncio.sleep(PATIENCE_S)
        return b""

    with pytest.raises(Refusal, match="shutting down"):
        await asyncio.wait_for(service.receive(receive()), PATIENCE_S / 2)


async def test_states_from_loading_to_lost() -> None:
    loading: Future[Any] = Future()
    service = service_of(loading)
    assert (service.is_live, service.is_ready, service.scorer) == (True, False, None)
    with pytest.raises(Refusal, match="still being loaded") as caught:
        await service.rank(work_of("1"))
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    scorer = HeldScorer(is_held=False)
    loading.set_result(scorer)
    assert (service.is_live, service.is_ready) == (True, True)
    scorer.state = "device lost"
    assert (service.is_live, service.is_ready) == (False, False)

    failed: Future[Any] = Future()
    failed.set_exception(RuntimeError("no model"))
    service = service_of(failed)
    assert (service.is_live, service.is_ready) == (False, False)
    with pytest.raises(Refusal, match="could not be loaded"):
        await service.rank(work_of("1"))


async def test_a_queue_that_others_fill_does_not_stop_the_event_loop() -> None:
    """The later parts of a request wait until the other users of the scorer have left room."""
    scorer = HeldScorer(is_held=False, max_queued_tokens=1000)
    scorer.config = dataclasses.replace(scorer.config, max_length=512)
    service = service_of(scorer)
    rank = scorer.arank_many

    async def rank_and_fill(requests: Any) -> Any:
        rankings = await rank(requests)
        scorer.queued_tokens = 1000  # of requests that the service does not know
        return rankings

    scorer.arank_many = rank_and_fill  # type: ignore[method-assign]
    ranking = asyncio.ensure_future(service.rank(work_of("1", "2")))
    await asyncio.sleep(0.1)  # the loop still runs
    assert not ranking.done()
    scorer.arank_many = rank  # type: ignore[method-assign]
    scorer.queued_tokens = 0
    ((first, second),) = await asyncio.wait_for(ranking, PATIENCE_S)
    assert (first.index, second.index) == (1, 0)


async def test_parts_that_wait_for_room_do_not_wake_up_each_other() -> None:
    """Otherwise they would encode their texts again and again, as long as a third part is running."""
    scorer = HeldScorer(max_queued_tokens=256)
    service = service_of(scorer)
    running = asyncio.ensure_future(service.rank(work_of("1 " * 200)))
    await until(lambda: scorer.num_calls == 1)
    rank_next_part_at_once(scorer, [5.0, 4.0])
    # Repeated passages pass the check of the words, and the scorer refuses them.
    passages = ["5", "4", *["3 " * 40] * 2, *["2 " * 40] * 2]
    long = asyncio.ensure_future(service.rank(work_of(*passages)))
    await let_others_run()
    assert scorer.num_asked == 3  # by the request that is running, and by the second and the third part once
    scorer.is_held = False
    (ranking,) = await asyncio.wait_for(long, PATIENCE_S)
    assert [(passage.index, passage.score) for passage in ranking] == [
        *((0, 5.0), (1, 4.0), (2, 3.0), (3, 3.0), (4, 2.0), (5, 2.0))
    ]
    assert len(await running) == 1


async def test_a_part_that_waits_tries_again_after_the_last_running_part_was_refused() -> None:
    scorer = HeldScorer(is_held=False, max_queued_tokens=256)
    service = service_of(scorer)
    rank, may_refuse = scorer.arank, asyncio.Event()

    async def rank_or_refuse(query: str, passages: Any) -> Ranking:
        if list(passages) == ["refused"]:
            await may_refuse.wait()
            raise QueueFullError("full")
        ranking = await rank(query, passages)
        scorer.queued_tokens = 256  # of requests that the service does not know
        return ranking

    scorer.arank = rank_or_refuse  # type: ignore[method-assign]
    refused = asyncio.ensure_future(service.rank(work_of("refused")))
    long = asyncio.ensure_future(service.rank(work_of("4", "3", "2")))
    await until(lambda: scorer.queued_tokens == 256)
    await let_others_run()  # the second part waits
    may_refuse.set()
    with pytest.raises(QueueFullError):
        await refused
    scorer.queued_tokens = 0
    (ranking,) = await asyncio.wait_for(long, PATIENCE_S)
    assert [passage.score for passage in ranking] == [4, 3, 2]
