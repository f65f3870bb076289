"""Requests that grow: the device computes the first parts while the later ones are encoded."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.inference import Pipeline
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.workers import Replica
from bge_rerank_integrations.engine.packing import PackedBatch
from bge_rerank_integrations.engine.runner import Runner, is_device_lost
from bge_rerank_integrations.errors import (
    NonFiniteScoreError,
    QueueFullError,
    RequestTimeoutError,
    ScorerClosedError,
)
from bge_rerank_integrations.ranking import Selection
from bge_rerank_integrations.text.pairs import PreparedPairs, _part_sizes
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import EncodedPair, IntArray, PairTokenizer
from bge_rerank_integrations.validation import Pair, group_pairs
from tests.support.interrupts import Interrupt
from tests.support.queues import PATIENCE_S, Done, Gate, ids, replica, sized, submit, wait_until
from tests.support.tolerances import LOGIT_TOLERANCE

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
NUM_PAIRS = 1300  # four parts
QUERY = "what is a panda?"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def batcher(gate: Gate) -> Iterator[MicroBatcher]:
    batcher = MicroBatcher([replica(gate)])
    yield batcher
    gate.let_through()
    batcher.close(timeout=1.0)


# --- in the queue ------------------------------------------------------------------------------------


def test_a_request_ends_when_its_last_part_does(batcher: MicroBatcher, gate: Gate) -> None:
    gate.let_through()
    request = Request()
    for start in range(0, 40, 10):
        assert not request.future.done()
        batcher.add(request, [ids(number) for number in range(start, start + 10)], is_last=start == 30)
    assert request.future.result(PATIENCE_S) == [float(number) for number in range(40)]
    stats = batcher.stats(cache_hits=0, cache_misses=0, splits=0)
    assert (stats.requests, stats.pairs, stats.queued_tokens) == (1, 40, 0)


def test_parts_of_a_request_may_be_empty(batcher: MicroBatcher, gate: Gate) -> None:
    gate.let_through()
    request = Request()
    batcher.add(request, [ids(1)], is_last=False)
    wait_until(lambda: request.num_unfinished == 0)
    batcher.add(request, [], is_last=False)
    assert not request.future.done()
    batcher.add(request, [])
    assert request.future.result(PATIENCE_S) == [1.0]
    nothing = Request()
    batcher.add(nothing, [])
    assert nothing.future.result(0) == []


@pytest.mark.parametrize("num_before", [1, 2, 3])
def test_the_batches_of_a_lone_request_do_not_depend_on_timing(
    batcher: MicroBatcher, gate: Gate, num_before: int
) -> None:
    """The batches are the same for any number of parts that are queued before the first batch is done."""
    parts = [[sized(n, 10 + 7 * n % 30) for n in range(start, start + 8)] for start in (0, 8, 16)]
    request = Request()
    for number, part in enumerate(parts):
        if number == num_before:
            gate.let_through()
            wait_until(lambda: request.num_unfinished == 0)
        batcher.add(request, part, is_last=part is parts[-1])
    gate.let_through()
    assert request.future.result(PATIENCE_S) == [float(n) for n in range(24)]
    alone: list[list[float]] = []
    for part in parts:
        other = Gate()
        other.let_through()
        single = MicroBatcher([replica(other)])
        submit(single, part).result(PATIENCE_S)
        single.close()
        alone += other.batches
    assert gate.batches == alone


def test_cancelling_drops_present_and_later_parts(batcher: MicroBatcher, gate: Gate) -> None:
    request = Request()
    batcher.add(request, [sized(6, 50)] * 4, is_last=False)
    gate.wait_until_entered()
    batcher.add(request, [sized(6, 50)] * 4, is_last=False)
    assert batcher.health().queued_tokens == 300
    assert request.future.cancel()
    assert batcher.health().queued_tokens == 0
    batcher.add(request, [sized(6, 50)] * 4)
    assert batcher.health().queued_tokens == 0
    gate.let_through()
    assert submit(batcher, [ids(1)]).result(PATIENCE_S) == [1.0]
    assert sum(batch.count(6.0) for batch in gate.batches) == 2
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).cancelled == 1


def test_a_request_cancelled_before_its_first_part_is_never_queued(batcher: MicroBatcher) -> None:
    request = Request()
    request.future.cancel()
    batcher.add(request, [ids(1)])
    batcher.add(request, [])
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).requests == 0


def test_nothing_is_added_to_a_request_that_failed(batcher: MicroBatcher, gate: Gate) -> None:
    request = Request()
    batcher.add(request, [ids(1)], is_last=False)
    gate.wait_until_entered()
    gate.error = ValueError("poison")
    gate.let_through()
    assert isinstance(request.future.exception(PATIENCE_S), ValueError)
    batcher.add(request, [ids(2)])
    assert batcher.health().queued_tokens == 0


def test_close_waits_for_the_parts_of_an_accepted_request(batcher: MicroBatcher, gate: Gate) -> None:
    gate.let_through()
    request, other = Request(), Request()
    with ThreadPoolExecutor(1) as feeder, ThreadPoolExecutor(1) as closer:
        feeder.submit(batcher.accept, request, num_tokens=1).result(PATIENCE_S)
        closing = closer.submit(batcher.close)
        wait_until(lambda: batcher.health().state == "closed")
        with pytest.raises(ScorerClosedError):
            batcher.accept(other, num_tokens=1)
        with pytest.raises(ScorerClosedError):
            batcher.add(other, [ids(9)])
        feeder.submit(batcher.add, request, [ids(1)], is_last=False).result(PATIENCE_S)
        with pytest.raises(FutureTimeoutError):  # it returns early only if it does not wait for the last part
            closing.result(0.1)
        feeder.submit(batcher.accept, request, num_tokens=2).result(PATIENCE_S)
        feeder.submit(batcher.add, request, [ids(2)]).result(PATIENCE_S)
        closing.result(PATIENCE_S)
    assert request.future.result(0) == [1.0, 2.0]


@pytest.mark.parametrize("ends", ["cancelled", "dropped", "closed again", "timeout"])
def test_close_does_not_wait_for_a_request_that_ends_early(
    batcher: MicroBatcher, gate: Gate, ends: str
) -> None:
    gate.let_through()
    request: Request | None = Request()
    assert request is not None
    with ThreadPoolExecutor(1) as feeder, ThreadPoolExecutor(1) as closer:
        feeder.submit(batcher.accept, request, num_tokens=1).result(PATIENCE_S)
        closing = closer.submit(batcher.close, 0.1 if ends == "timeout" else None)
        wait_until(lambda: batcher.health().state == "closed")
        match ends:
            case "cancelled":
                request.future.cancel()
            case "dropped":
                feeder.submit(int).result(PATIENCE_S)  # its thread may still hold its last task
                request = None
            case "closed again":
                batcher.close(0.0)
        closing.result(PATIENCE_S)
        if request is not None and ends != "cancelled":
            with pytest.raises(ScorerClosedError):
                feeder.submit(batcher.add, request, [ids(1)]).result(PATIENCE_S)


def test_a_thread_that_closes_the_batcher_does_not_wait_for_its_own_request(batcher: MicroBatcher) -> None:
    request = Request()
    batcher.accept(request, num_tokens=1)
    batcher.close()
    with pytest.raises(ScorerClosedError):
        batcher.add(request, [ids(1)])


def test_a_batcher_knows_the_threads_that_must_not_wait_for_others() -> None:
    def launch(sequences: list[IntArray], *, is_alone: bool) -> Done:
        return Done([float(queue.is_in_a_call())] * len(sequences))

    queue = MicroBatcher([Replica(launch, lambda: 100)])
    request = Request()
    assert not queue.is_in_a_call()
    queue.accept(request, num_tokens=1)
    assert queue.is_in_a_call()
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(queue.is_in_a_call).result(PATIENCE_S)
    queue.add(request, [ids(1)])
    assert not queue.is_in_a_call()
    assert request.future.result(PATIENCE_S) == [1.0]
    with queue._changed:
        assert queue.is_in_a_call()
    queue.close()


def test_a_part_that_is_added_after_close_is_refused(batcher: MicroBatcher, gate: Gate) -> None:
    gate.let_through()
    request = Request()
    batcher.add(request, [ids(1)], is_last=False)
    batcher.close()
    with pytest.raises(ScorerClosedError):
        batcher.add(request, [ids(2)])


# --- through the pipeline ----------------------------------------------------------------------------


class WatchedTokenizer(PairTokenizer):
    """Counts the encoded parts, and calls `before` with the number of each part except the first."""

    num_parts = 0
    before: Callable[[int], object] = staticmethod(lambda number: None)

    def stream(self, pairs: Sequence[Pair], part_sizes: Sequence[int]) -> Iterator[list[EncodedPair]]:
        for part in super().stream(pairs, part_sizes):
            if self.num_parts:
                self.before(self.num_parts)
            self.num_parts += 1
            yield part


class Device:
    """A pipeline with a watched tokenizer and a model whose score is the number of tokens."""

    def __init__(self, checkpoint: Path, **settings: Any) -> None:
        config = ScorerConfig(model=str(checkpoint), device="cpu", dtype="float32", **settings)
        self.cache = TokenCache(1_000_000)
        self.tokenizer = WatchedTokenizer(checkpoint / "tokenizer.json", config, self.cache)
        self.begun = threading.Event()
        self.num_sequences = 0
        self.give: Callable[[torch.Tensor], torch.Tensor] = lambda lengths: lengths
        runner = Runner(self.forward, device=torch.device("cpu"), padding_idx=1, max_batch_tokens=2048)
        self.pipeline = Pipeline(self.tokenizer, self.cache, [runner], config, is_device_lost)

    def hold(self) -> threading.Event:
        """Let every batch wait until the returned event is set."""
        may_finish = threading.Event()

        def give(lengths: torch.Tensor) -> torch.Tensor:
            assert may_finish.wait(PATIENCE_S)
            return lengths

        self.give = give
        return may_finish

    def hold_encoding(self) -> tuple[threading.Event, threading.Event]:
        """Let the encoding wait before each part except the first.

        Returns:
            An event that is set when the encoding waits, and one that lets it go on.
        """
        is_waiting, may_encode = threading.Event(), threading.Event()

        def hold(_: int) -> None:
            is_waiting.set()
            assert may_encode.wait(PATIENCE_S)

        self.tokenizer.before = hold
        return is_waiting, may_encode

    def score(self, pairs: list[Pair], **options: Any) -> list[float]:
        prepared = PreparedPairs(group_pairs(pairs))
        return prepared.scores(self.pipeline.run(prepared, **options), normalize=False)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        self.begun.set()
        self.num_sequences += len(batch.seqlens.lengths)
        return self.give(torch.tensor(batch.seqlens.lengths, dtype=torch.float32))


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Callable[..., Device]]:
    """Return a function that creates devices. They are closed after the test."""
    made: list[Device] = []

    def build(**settings: Any) -> Device:
        made.append(Device(checkpoint, **settings))
        return made[-1]

    yield build
    for device in made:
        device.pipeline.close(timeout=1.0)


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return [f"passage number {number} " + "word " * (number % 7) for number in range(NUM_PAIRS)]


def pairs_of(passages: Sequence[str]) -> list[Pair]:
    return [(QUERY, passage) for passage in passages]


def lengths_of(device: Device, pairs: list[Pair]) -> list[float]:
    encoded = PairTokenizer.encode(
        device.tokenizer, [query for query, _ in pairs], [text for _, text in pairs]
    )
    return [float(sum(map(len, pair.windows))) for pair in encoded]


@given(st.integers(0, 5000))
def test_parts_are_small_at_first_and_similar_in_size_later(num_pairs: int) -> None:
    first, *others = sizes = _part_sizes(num_pairs)
    assert sum(sizes) == num_pairs
    assert first == min(num_pairs, 32)
    assert all(0 < size <= 512 for size in others)
    assert not others or max(others) - min(others) <= 1
    assert len(others) >= 2 or num_pairs < 96


def test_the_device_begins_before_all_is_encoded(start: Callable[..., Device], passages: list[str]) -> None:
    device = start()
    begun_before: list[bool] = []
    device.tokenizer.before = lambda _: begun_before.append(device.begun.wait(PATIENCE_S))
    scores = device.score(pairs_of(passages))
    assert begun_before == [True, True, True]
    device.tokenizer.before = lambda _: None
    assert scores == lengths_of(device, pairs_of(passages))
    stats = device.pipeline.stats()
    assert (stats.requests, stats.pairs, stats.queued_tokens) == (1, NUM_PAIRS, 0)


async def test_the_device_begins_before_all_is_encoded_for_an_async_caller(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start()
    begun_before: list[bool] = []
    device.tokenizer.before = lambda _: begun_before.append(device.begun.wait(PATIENCE_S))
    prepared = PreparedPairs([(QUERY, passages)])
    logits = await device.pipeline.arun(prepared)
    assert begun_before == [True, True, True]
    device.tokenizer.before = lambda _: None
    assert prepared.scores(logits, normalize=False) == lengths_of(device, pairs_of(passages))
    (ranking,) = prepared.rankings(logits, Selection(None, None, normalize=False))
    assert ranking.num_tokens == sum(logits)


def test_duplicates_in_different_parts_are_encoded_and_scored_once(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start()
    twice = [*pairs_of([*passages, *reversed(passages)]), *(("another", text) for text in passages[:10])]
    scores = device.score(twice)
    stats = device.pipeline.stats()
    assert (stats.pairs, device.num_sequences) == (NUM_PAIRS + 10, NUM_PAIRS + 10)
    assert (stats.duplicates, stats.truncations) == (NUM_PAIRS, 0)
    assert (stats.cache_misses, stats.cache_hits) == (NUM_PAIRS, 0), "each passage is looked up once"
    assert scores == lengths_of(device, twice)
    device.score(twice)
    stats = device.pipeline.stats()
    assert (stats.cache_misses, stats.cache_hits) == (NUM_PAIRS, 2 * NUM_PAIRS)
    assert stats.cache_hit_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize("settings", [{}, {"max_queued_tokens": 1_000_000}])
def test_a_timeout_ends_the_encoding(
    start: Callable[..., Device], passages: list[str], settings: dict[str, Any]
) -> None:
    device = start(**settings)
    with pytest.raises(RequestTimeoutError):
        device.score(pairs_of(passages), timeout=0.0)
    assert device.tokenizer.num_parts == 1
    assert device.pipeline.health().queued_tokens == 0


@pytest.mark.parametrize("settings", [{}, {"max_queued_tokens": 1_000_000}])
async def test_cancellation_ends_the_encoding(
    start: Callable[..., Device], passages: list[str], settings: dict[str, Any]
) -> None:
    device = start(**settings)
    reached, cancelled = device.hold_encoding()
    task = asyncio.create_task(device.pipeline.arun(PreparedPairs([(QUERY, passages)])))
    assert await asyncio.to_thread(reached.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cancelled.set()
    device.pipeline.close()  # waits for the encoding thread
    assert device.tokenizer.num_parts == 2
    assert device.num_sequences <= 64 + 512
    assert device.pipeline.health().queued_tokens == 0


def test_a_full_queue_refuses_before_the_encoding(start: Callable[..., Device], passages: list[str]) -> None:
    running, waiting = pairs_of(passages[:1]), pairs_of(passages[1:11])
    num_tokens = int(sum(lengths_of(start(), waiting)))
    device = start(max_queued_tokens=num_tokens)
    may_finish = device.hold()
    with ThreadPoolExecutor() as pool:
        try:
            futures = [pool.submit(device.score, running)]
            assert device.begun.wait(PATIENCE_S)
            futures.append(pool.submit(device.score, waiting))
            wait_until(lambda: device.pipeline.health().queued_tokens == num_tokens)
            with pytest.raises(QueueFullError):
                device.score(pairs_of(passages[20:]))
            assert device.tokenizer.num_parts == 2, "the refused passages were not encoded"
        finally:
            may_finish.set()
        assert [len(future.result(PATIENCE_S)) for future in futures] == [1, 10]


@pytest.mark.parametrize("settings", [{}, {"max_queued_tokens": 1_000_000}])
def test_close_waits_for_a_call_that_is_encoding(
    start: Callable[..., Device], passages: list[str], settings: dict[str, Any]
) -> None:
    device = start(**settings)
    is_encoding, may_encode = device.hold_encoding()
    with ThreadPoolExecutor(2) as pool:
        try:
            accepted = pool.submit(device.score, pairs_of(passages))
            assert is_encoding.wait(PATIENCE_S)
            closing = pool.submit(device.pipeline.close)
            wait_until(lambda: device.pipeline.health().state == "closed")
            with pytest.raises(ScorerClosedError):
                device.score(pairs_of(passages[:1]))
            assert not closing.done()
        finally:
            may_encode.set()
        scores = accepted.result(PATIENCE_S)
        closing.result(PATIENCE_S)
    device.tokenizer.before = lambda _: None
    assert scores == lengths_of(device, pairs_of(passages))


def test_finalizers_can_close_a_scorer_in_the_middle_of_several_calls(
    start: Callable[..., Device], passages: list[str]
) -> None:
    class Owner:
        def __del__(self) -> None:
            device.pipeline.close()

    def drop_an_owner(_: int) -> None:
        owner = Owner()
        if threading.get_ident() not in callers:
            callers.add(threading.get_ident())
            meeting.wait(PATIENCE_S)
        del owner

    callers: set[int] = set()
    device, meeting = start(), threading.Barrier(2)
    device.tokenizer.before = drop_an_owner
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(device.score, pairs_of(passages[:100])) for _ in range(2)]
        scores = [call.result(PATIENCE_S) for call in calls]
    device.tokenizer.before = lambda _: None
    assert scores == [lengths_of(device, pairs_of(passages[:100]))] * 2
    wait_until(lambda: device.pipeline.health().replicas_alive == 0)
    assert device.pipeline.health().state == "closed"


# Python only reports an exception in the `close` of a generator.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_close_does_not_wait_for_an_interrupted_call(
    start: Callable[..., Device], passages: list[str]
) -> None:
    kept: list[Interrupt] = []
    is_reached = True
    while is_reached:
        device = start()
        device.score(pairs_of(passages[:1]))  # starts the threads
        kept.append(Interrupt(len(kept)))

        def score(arm: Callable[[], None] = kept[-1].arm, device: Device = device) -> None:
            arm()
            device.score(pairs_of(passages[:2]))

        kept[-1].call(score)
        is_reached = kept[-1].is_reached
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(device.pipeline.close, PATIENCE_S).result()
        assert time.monotonic() - began < PATIENCE_S, f"interrupt {len(kept)}"
    assert len(kept) > 20


async def test_a_pipeline_that_is_closing_refuses_async_calls(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start()
    may_finish = device.hold()
    accepted = asyncio.create_task(device.pipeline.arun(PreparedPairs([(QUERY, passages[:1])])))
    assert await asyncio.to_thread(device.begun.wait, PATIENCE_S)
    closing = asyncio.create_task(asyncio.to_thread(device.pipeline.close))
    try:
        await asyncio.to_thread(wait_until, lambda: device.pipeline.health().state == "closed")
        with pytest.raises(ScorerClosedError):
            await device.pipeline.arun(PreparedPairs([(QUERY, passages[:1])]))
    finally:
        may_finish.set()
    await closing
    assert len(await accepted) == 1


def test_an_error_of_the_device_ends_the_encoding(start: Callable[..., Device], passages: list[str]) -> None:
    device = start()

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("the device is on fire")

    device.give = fail
    device.tokenizer.before = lambda _: wait_until(lambda: device.pipeline.stats().failed)
    with pytest.raises(ValueError, match="on fire"):
        device.score(pairs_of(passages))
    assert device.tokenizer.num_parts == 2


def test_an_error_of_the_encoding_drops_what_is_queued(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start()

    def before(_: int) -> None:
        raise MemoryError

    device.tokenizer.before = before
    with pytest.raises(MemoryError):
        device.score(pairs_of(passages))
    assert device.pipeline.health().queued_tokens == 0
    assert device.pipeline.stats().cancelled == 1


def test_a_full_queue_refuses_a_long_request_before_any_of_it_is_computed(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start(max_queued_tokens=10_000)
    with pytest.raises(QueueFullError):
        device.score(pairs_of(passages))
    assert device.num_sequences == 0
    assert device.tokenizer.num_parts < len(_part_sizes(NUM_PAIRS)), "the rest is not encoded"
    assert len(device.score(pairs_of(passages[:100]))) == 100


def test_a_request_is_queued_as_a_whole_if_the_queue_has_a_limit(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start(max_queued_tokens=1_000_000)
    begun_before: list[bool] = []
    device.tokenizer.before = lambda _: begun_before.append(device.begun.is_set())
    scores = device.score(pairs_of(passages))
    assert begun_before == [False, False, False]
    device.tokenizer.before = lambda _: None
    assert scores == lengths_of(device, pairs_of(passages))
    stats = device.pipeline.stats()
    assert (stats.requests, stats.pairs, stats.queued_tokens) == (1, NUM_PAIRS, 0)


def test_a_pair_with_a_non_finite_score_is_named_in_any_part(
    start: Callable[..., Device], passages: list[str]
) -> None:
    device = start()
    marked = [*passages[:1200], "word " * 300, *passages[1200:]]
    device.give = lambda lengths: torch.where(lengths > 200, torch.nan, lengths)
    with pytest.raises(NonFiniteScoreError) as caught:
        device.score(pairs_of(marked))
    assert caught.value.index == 1200


@pytest.mark.parametrize(
    "settings", [{}, {"max_length": 32, "long_passages": "windows", "window_overlap_tokens": 2}]
)
def test_the_progress_bar_ends_at_its_total(
    start: Callable[..., Device], passages: list[str], settings: dict[str, Any]
) -> None:
    device = start(**settings)
    long = [*passages, "word " * 100, "other " * 100]
    shown = io.StringIO()
    with redirect_stderr(shown):
        num_windows = len(device.pipeline.run(PreparedPairs([(QUERY, long)]), progress=True))
    assert (num_windows > len(long)) == bool(settings)
    assert f"{num_windows}/{num_windows}" in shown.getvalue()


def test_long_requests_score_as_short_ones_do(scorer: Scorer, passages: list[str]) -> None:
    whole = scorer.score([(QUERY, passage) for passage in passages])
    some = [0, 63, 64, 575, 576, 1087, 1088, 1299]
    assert [whole[index] for index in some] == pytest.approx(
        scorer.score([(QUERY, passages[index]) for index in some]), abs=TOLERANCE
    )
    assert whole == scorer.score([(QUERY, passage) for passage in passages]), (
        "a lone request gets the same bits every time"
    )
