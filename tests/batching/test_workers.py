"""Workers that launch the next batch before they wait for the oldest one."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest

from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.workers import Pending, Replica
from bge_rerank_integrations.engine.runner import is_device_lost
from bge_rerank_integrations.errors import DeviceLostError, ScorerClosedError, WorkerDiedError
from bge_rerank_integrations.text.tokenization import IntArray
from tests.support.queues import (
    PATIENCE_S,
    AsyncDevice,
    Done,
    firsts,
    ids,
    lost,
    results,
    sized,
    submit,
    wait_until,
)


@pytest.fixture
def make() -> Iterator[Callable[..., MicroBatcher]]:
    """Return a function that creates batchers of asynchronous devices. They are closed after the test."""
    made: list[tuple[MicroBatcher, tuple[AsyncDevice, ...]]] = []

    def build(*devices: AsyncDevice, budget: int = 100, **options: Any) -> MicroBatcher:
        replicas = [Replica(device.launch, lambda: budget, device.depth) for device in devices]
        batcher = MicroBatcher(replicas, is_device_lost=is_device_lost, **options)
        made.append((batcher, devices))
        return batcher

    yield build
    for batcher, devices in made:
        for device in devices:
            device.finish(1000)
        batcher.close(timeout=1.0)


# --- the device never waits --------------------------------------------------------------------------


def test_a_device_always_holds_another_batch_while_anything_is_queued(
    make: Callable[..., MicroBatcher],
) -> None:
    """The queue launches a batch behind the running one before that is done, for many batches and requests."""
    device = AsyncDevice()
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 50)] * 7) for number in range(40)]
    while batcher.health().queued_tokens:
        wait_until(lambda: len(device.launched) == device.num_read + 2 or not batcher.health().queued_tokens)
        assert len(device.launched) <= device.num_read + 2
        device.finish(1)
    device.finish(2)
    assert results(futures) == [[float(number)] * 7 for number in range(40)]
    assert device.num_read > 100


def test_a_request_that_arrives_while_the_device_computes_is_launched_at_once(
    make: Callable[..., MicroBatcher],
) -> None:
    device = AsyncDevice()
    batcher = make(device)
    first = submit(batcher, [sized(1, 100)])
    wait_until(lambda: len(device.launched) == 1 and device.num_waiting)
    second = submit(batcher, [sized(2, 100)])
    wait_until(lambda: len(device.launched) == 2)
    assert not first.done()
    device.finish(2)
    assert results([first, second]) == [[1.0], [2.0]]


def test_the_next_batch_of_another_request_is_launched_before_the_oldest_is_done(
    make: Callable[..., MicroBatcher],
) -> None:
    device = AsyncDevice()
    batcher = make(device)
    first = submit(batcher, [sized(1, 100)])
    second = submit(batcher, [sized(2, 100)])
    third = submit(batcher, [sized(3, 100)])
    wait_until(lambda: len(device.launched) == 2)
    assert not first.done()
    device.finish(1)
    assert first.result(PATIENCE_S) == [1.0]
    wait_until(lambda: len(device.launched) == 3)
    assert not second.done()
    device.finish(2)
    assert results([second, third]) == [[2.0], [3.0]]
    assert device.launched == [[1.0], [2.0], [3.0]]


def test_few_tokens_wait_until_the_device_is_idle_so_that_others_can_join(
    make: Callable[..., MicroBatcher],
) -> None:
    device = AsyncDevice()
    batcher = make(device, budget=1000)
    first = submit(batcher, [sized(1, 100)])
    wait_until(lambda: device.launched)
    others = [submit(batcher, [sized(number, 10)]) for number in range(2, 10)]
    device.finish(1)
    assert first.result(PATIENCE_S) == [1.0]
    wait_until(lambda: len(device.launched) == 2)
    assert sorted(device.launched[1]) == [float(number) for number in range(2, 10)]
    device.finish(1)
    results(others)


def test_an_idle_device_gets_its_next_batch_while_answers_are_given(
    make: Callable[..., MicroBatcher],
) -> None:
    device = AsyncDevice()
    batcher = make(device, budget=1000)
    launched: list[int] = []

    def answer(_: object) -> None:
        wait_until(lambda: len(device.launched) == 2)
        launched.append(len(device.launched))

    first = submit(batcher, [sized(1, 100)])
    first.add_done_callback(answer)
    wait_until(lambda: device.launched)
    second = submit(batcher, [sized(2, 10)])  # too few tokens to be launched ahead
    device.finish(2)
    assert results([first, second]) == [[1.0], [2.0]]
    assert launched == [2]


def test_a_busy_device_leaves_what_waits_to_an_idle_one(make: Callable[..., MicroBatcher]) -> None:
    devices = [AsyncDevice(), AsyncDevice()]
    batcher = make(*devices)
    futures = [submit(batcher, [sized(number, 100)]) for number in range(2)]
    wait_until(lambda: all(device.launched for device in devices))
    assert [len(device.launched) for device in devices] == [1, 1]
    futures += [submit(batcher, [sized(number, 100)]) for number in range(2, 4)]
    wait_until(lambda: [len(device.launched) for device in devices] == [2, 2])
    for device in devices:
        device.finish(2)
    assert results(futures) == [[float(number)] for number in range(4)]


def test_a_busy_device_takes_what_an_idle_one_has_left(make: Callable[..., MicroBatcher]) -> None:
    devices = [AsyncDevice(), AsyncDevice()]
    batcher = make(*devices)
    first = submit(batcher, [sized(0, 100)])
    wait_until(lambda: any(device.launched for device in devices))
    rest = submit(batcher, [sized(number, 100) for number in range(1, 4)])
    wait_until(lambda: [len(device.launched) for device in devices] == [2, 2])
    for device in devices:
        device.finish(2)
    assert results([first, rest]) == [[0.0], [1.0, 2.0, 3.0]]


def test_a_launch_says_whether_the_device_is_empty(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    were_alone: list[bool] = []

    def launch(sequences: list[IntArray], *, is_alone: bool) -> Pending | None:
        were_alone.append(is_alone)
        return device.launch(sequences, is_alone=is_alone)

    batcher = MicroBatcher([Replica(launch, lambda: 100, 2)], is_device_lost=is_device_lost)
    futures = [submit(batcher, [sized(number, 100)]) for number in range(2)]
    wait_until(lambda: len(were_alone) == 2)
    device.finish(2)
    results(futures)
    futures = [submit(batcher, [sized(2, 100)])]
    device.finish(1)
    results(futures)
    assert were_alone == [True, False, True]
    batcher.close()


def test_a_batch_without_memory_is_launched_when_the_one_before_it_is_answered(
    make: Callable[..., MicroBatcher],
) -> None:
    device = AsyncDevice(max_tokens=150)
    batcher = make(device)
    is_answering, may_answer = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        is_answering.set()
        assert may_answer.wait(PATIENCE_S)

    first = submit(batcher, [sized(1, 100)], hold)
    wait_until(lambda: device.num_waiting)
    second = submit(batcher, [sized(2, 100)])
    wait_until(lambda: device.num_refused == 1)
    device.finish(2)
    assert is_answering.wait(PATIENCE_S)
    time.sleep(0.05)  # the worker waits for the memory
    may_answer.set()
    assert results([first, second]) == [[1.0], [2.0]]


def test_the_time_behind_another_batch_is_no_computing_time(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    batcher = make(device)
    started = time.monotonic()
    futures = [submit(batcher, [sized(number, 100)]) for number in range(3)]
    for future in futures:
        time.sleep(0.05)
        device.finish(1)
        future.result(PATIENCE_S)
    elapsed_ms = 1000 * (time.monotonic() - started)
    # The two longest of the three batches were computed one after the other.
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).compute.p50_ms <= elapsed_ms / 2


def test_the_time_without_work_is_no_computing_time(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    device.finish(2)
    batcher = make(device)
    submit(batcher, [ids(1)]).result(PATIENCE_S)
    time.sleep(0.05)
    started = time.monotonic()
    submit(batcher, [ids(2)]).result(PATIENCE_S)
    elapsed_ms = 1000 * (time.monotonic() - started)
    # Of two values, the smaller one is the median. The second batch was computed in the measured time.
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).compute.p50_ms <= elapsed_ms


# --- errors while several batches are on the device --------------------------------------------------


def test_an_error_of_the_second_batch_leaves_the_first_alone(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    device.errors[2.0] = ValueError("poison")
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 100)]) for number in (1, 2, 3)]
    wait_until(lambda: len(device.launched) == 2)
    device.finish(3)
    assert futures[0].result(PATIENCE_S) == [1.0]
    assert isinstance(futures[1].exception(PATIENCE_S), ValueError)
    assert futures[2].result(PATIENCE_S) == [3.0]


def test_a_shared_batch_that_fails_is_repeated_beside_another_batch(
    make: Callable[..., MicroBatcher],
) -> None:
    device = AsyncDevice()
    device.errors[5.0] = ValueError("poison")
    batcher = make(device)
    first = submit(batcher, [sized(1, 100)])
    wait_until(lambda: device.launched)
    shared = [submit(batcher, [sized(number, 30)]) for number in (4, 5, 6)]
    device.finish(20)
    assert first.result(PATIENCE_S) == [1.0]
    assert [type(future.exception(PATIENCE_S)) for future in shared] == [type(None), ValueError, type(None)]


def test_a_lost_device_gives_both_its_batches_back(make: Callable[..., MicroBatcher]) -> None:
    """A request with sequences in both batches has lost one device, not two."""
    bad, good = AsyncDevice(), AsyncDevice()
    batcher = make(bad, good)
    occupying = [submit(batcher, [sized(number, 100)]) for number in range(4)]
    wait_until(lambda: len(bad.launched) == len(good.launched) == 2)
    bad.finish(2)  # only this device becomes free, and launches two batches of the next request
    for (number,) in list(bad.launched):
        assert occupying[int(number)].result(PATIENCE_S) == [number]
    long = submit(batcher, [sized(number, 100) for number in range(10, 12)])
    wait_until(lambda: len(bad.launched) == 4)
    bad.error = lost()
    bad.finish(10)
    good.finish(10)
    assert long.result(PATIENCE_S) == [10.0, 11.0]
    assert results(occupying) == [[0.0], [1.0], [2.0], [3.0]]
    assert batcher.health().replicas_alive == 1


def test_a_loss_while_answers_are_given_does_not_score_a_sequence_twice(
    make: Callable[..., MicroBatcher],
) -> None:
    """Otherwise the second score of the first sequence would count as that of the sequence that is missing."""
    bad, good = AsyncDevice(), AsyncDevice()
    batcher = make(bad, good)
    filling = [submit(batcher, [sized(number, 100)]) for number in range(10, 14)]
    wait_until(lambda: len(bad.launched) == len(good.launched) == 2)
    bad.finish(2)  # only this device has room now
    for (number,) in list(bad.launched):
        filling[int(number) - 10].result(PATIENCE_S)
    reporting, may_go_on = threading.Event(), threading.Event()

    def on_progress(_: int) -> None:
        reporting.set()
        assert may_go_on.wait(PATIENCE_S)

    request = Request(on_progress)
    batcher.add(request, [sized(1, 100)], is_last=False)
    wait_until(lambda: len(bad.launched) == 3)
    bad.launch_error = lost()
    bad.finish(1)
    assert reporting.wait(PATIENCE_S)
    batcher.add(request, [sized(2, 100)])
    wait_until(lambda: batcher.health().replicas_alive == 1)
    may_go_on.set()
    good.finish(10)
    assert request.future.result(PATIENCE_S) == [1.0, 2.0]
    assert results(filling) == [[10.0], [11.0], [12.0], [13.0]]
    assert (bad.launched + good.launched).count([1.0]) == 1


def test_the_loss_of_the_only_device_fails_both_its_batches(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 100)]) for number in range(5)]
    wait_until(lambda: len(device.launched) == 2)
    device.error = lost()
    device.finish(10)
    assert {type(future.exception(PATIENCE_S)) for future in futures} == {DeviceLostError}
    assert batcher.health().queued_tokens == 0


def test_no_request_waits_for_a_worker_that_died_with_two_batches(
    make: Callable[..., MicroBatcher], caplog: pytest.LogCaptureFixture
) -> None:
    device = AsyncDevice()
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 100)]) for number in range(5)]
    wait_until(lambda: len(device.launched) == 2)
    device.error = SystemExit()
    device.finish(1)
    assert {type(future.exception(PATIENCE_S)) for future in futures} == {WorkerDiedError}
    wait_until(lambda: "a worker thread died of SystemExit" in caplog.text)
    device.error = None
    device.finish(10)
    assert submit(batcher, [ids(5)]).result(PATIENCE_S) == [5.0]


class RaisingFilter(logging.Filter):
    """A filter that needs something that only the threads of an application have."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("working outside of request context")


@pytest.mark.parametrize(
    ("error", "expected"), [(SystemExit(), WorkerDiedError), (lost(), DeviceLostError)], ids=["death", "loss"]
)
def test_a_logging_filter_that_raises_keeps_no_request_waiting(
    make: Callable[..., MicroBatcher], error: BaseException, expected: type[Exception]
) -> None:
    logger, raising = logging.getLogger("bge_rerank_integrations"), logging.StreamHandler()
    raising.addFilter(RaisingFilter())
    logger.addHandler(raising)
    try:
        device = AsyncDevice()
        batcher = make(device)
        futures = [submit(batcher, [sized(number, 100)]) for number in range(5)]
        wait_until(lambda: len(device.launched) == 2)
        device.error = error
        device.finish(1)
        assert {type(future.exception(PATIENCE_S)) for future in futures} == {expected}
    finally:
        logger.removeHandler(raising)


def test_close_waits_for_both_batches(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 100)]) for number in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    device.finish(10)
    closing.join(PATIENCE_S)
    assert [future.result(0) for future in futures] == [[float(number)] for number in range(5)]


def test_close_with_a_timeout_fails_the_requests_of_both_batches(make: Callable[..., MicroBatcher]) -> None:
    device = AsyncDevice()
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 100)]) for number in range(5)]
    wait_until(lambda: len(device.launched) == 2)
    batcher.close(timeout=0.05)
    assert {type(future.exception(0)) for future in futures} == {ScorerClosedError}


def test_out_of_memory_puts_sequences_back_and_other_requests_do_not_notice(
    make: Callable[..., MicroBatcher],
) -> None:
    """The device has memory for 150 tokens, so two batches of 100 tokens do not fit."""
    device = AsyncDevice(max_tokens=150)
    device.finish(1000)
    batcher = make(device)
    futures = [submit(batcher, [sized(number, 20)] * 10) for number in range(20)]
    assert results(futures) == [[float(number)] * 10 for number in range(20)]
    assert device.num_refused > 0
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).pairs == 200


def test_three_thousand_requests_through_errors_losses_and_full_memory() -> None:
    """Each request ends with its own result or error, whatever happens to the batches beside it."""
    chooser = random.Random(0)
    lock = threading.Lock()
    num_launches = 0

    def launch(sequences: list[IntArray], *, is_alone: bool) -> Done | None:
        nonlocal num_launches
        with lock:
            num_launches += 1
            number, draw = num_launches, chooser.random()
        if number in (300, 600):
            raise lost()
        if number == 900:
            return Done([], lost())  # the loss shows when the batch is waited for
        if draw < 0.02:
            raise FloatingPointError("injected")
        if draw > 0.95 and not is_alone:
            return None
        return Done(firsts(sequences), FloatingPointError("injected") if draw > 0.93 else None)

    replicas = [Replica(launch, lambda: 20, 2 + number % 2) for number in range(5)]
    batcher = MicroBatcher(replicas, is_device_lost=is_device_lost)
    futures = [submit(batcher, [sized(number, chooser.randrange(1, 9))] * 3) for number in range(3000)]
    doomed = {number for number in range(3000) if chooser.random() < 0.1 and futures[number].cancel()}
    assert not wait(futures, timeout=PATIENCE_S).not_done
    num_errors = 0
    for number, future in enumerate(futures):
        if number in doomed:
            assert future.cancelled()
        elif error := future.exception(0):
            assert isinstance(error, FloatingPointError | DeviceLostError)
            num_errors += 1
        else:
            assert future.result(0) == [float(number)] * 3
    assert 0 < num_errors < 400
    batcher.close()
    health, stats = batcher.health(), batcher.stats(cache_hits=0, cache_misses=0, splits=0)
    assert (stats.cancelled, stats.failed, stats.lost_replicas) == (len(doomed), num_errors, 3)
    assert health.queued_tokens == 0
