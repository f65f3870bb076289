"""The queue with plain score functions: every request ends with a result, with an error, or cancelled."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.batching import timeouts
from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.queue import RequestQueue
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.engine.packing import PackedBatch
from bge_rerank_integrations.engine.runner import Runner, is_device_lost
from bge_rerank_integrations.errors import (
    DeviceLostError,
    ForkedProcessError,
    InputError,
    QueueFullError,
    RequestTimeoutError,
    ScorerClosedError,
    WorkerDiedError,
)
from bge_rerank_integrations.runtime.locks import SafeCondition
from bge_rerank_integrations.text.tokenization import IntArray
from tests.support.engine import replica_of
from tests.support.interrupts import Interrupt, call_at, stop
from tests.support.queues import PATIENCE_S, Gate, firsts, ids, replica, results, sized, submit
from tests.support.threads import refuse_to_start
from tests.support.tolerances import LOGIT_TOLERANCE


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def make() -> Iterator[Callable[..., MicroBatcher]]:
    """Return a function that creates batchers. They are closed after the test."""
    made: list[MicroBatcher] = []

    def build(
        score: Callable[[list[IntArray]], list[float]], budget: int = 100, **options: Any
    ) -> MicroBatcher:
        made.append(MicroBatcher([replica(score, budget)], **options))
        return made[-1]

    yield build
    for batcher in made:
        batcher.close(timeout=1.0)


def test_results_come_back_in_each_requests_own_order(make: Callable[..., MicroBatcher]) -> None:
    batcher = make(firsts, budget=50)
    numbers = random.Random(0)
    requests = [
        [sized(numbers.randrange(1000), numbers.randrange(1, 60)) for _ in range(7)] for _ in range(60)
    ]
    futures = [submit(batcher, request) for request in requests]
    assert results(futures) == [firsts(request) for request in requests]
    stats = batcher.stats(cache_hits=0, cache_misses=0, splits=0)
    assert (stats.requests, stats.pairs, stats.failed, stats.cancelled) == (60, 420, 0, 0)
    assert (stats.queued_requests, stats.queued_tokens) == (0, 0)
    assert stats.tokens == sum(len(sequence) for request in requests for sequence in request)
    assert 0.0 < stats.fill <= 1
    assert stats.waiting.p99_ms >= stats.waiting.p50_ms >= 0.0


def test_an_empty_request_is_done_at_once(make: Callable[..., MicroBatcher]) -> None:
    assert submit(make(firsts), []).result(0) == []


def test_waiting_requests_share_a_batch(make: Callable[..., MicroBatcher], gate: Gate) -> None:
    batcher = make(gate)
    futures = [submit(batcher, [ids(0)])]
    gate.wait_until_entered()
    futures += [submit(batcher, [ids(number)]) for number in range(1, 11)]
    gate.let_through()
    results(futures)
    assert [sorted(batch) for batch in gate.batches] == [[0], list(range(1, 11))]
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).requests_per_batch == 5.5


def test_batches_stay_within_the_budget(make: Callable[..., MicroBatcher], gate: Gate) -> None:
    seen: list[int] = []

    def score(batch: list[IntArray]) -> list[float]:
        seen.append(sum(map(len, batch)))
        return gate(batch)

    batcher = make(score, budget=100)
    futures = [submit(batcher, [sized(1, 30), sized(2, 45), sized(3, 5)]) for _ in range(9)]
    gate.let_through()
    results(futures)
    assert max(seen) <= 100
    futures = [submit(batcher, [sized(1, 300)])]
    results(futures)
    assert seen[-1] == 300, "a sequence longer than the budget is a batch by itself"


def test_a_short_request_overtakes_a_long_one_that_still_makes_progress(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate, budget=100)
    long = submit(batcher, [sized(1, 10)] * 100)
    gate.wait_until_entered()
    shorts = [submit(batcher, [sized(2, 10)] * 3) for _ in range(8)]
    for _ in range(5):
        gate.let_through(1)
        gate.wait_until_entered()
    assert all(short.done() for short in shorts)
    assert not long.done()
    # The oldest request got its share of every batch.
    assert all(1.0 in batch for batch in gate.batches)
    gate.let_through()
    assert long.result(PATIENCE_S) == [1.0] * 100


def test_a_request_waits_up_to_max_wait_ms_for_a_full_batch(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    gate.let_through()
    batcher = make(gate, budget=4, max_wait_ms=600_000)
    futures = [submit(batcher, [ids(number)]) for number in range(4)]
    results(futures)  # this times out before `max_wait_ms`: a full batch does not wait
    assert gate.batches == [[0.0, 1.0, 2.0, 3.0]]


def test_a_request_runs_alone_after_max_wait_ms(make: Callable[..., MicroBatcher]) -> None:
    assert submit(make(firsts, max_wait_ms=20), [ids(7)]).result(PATIENCE_S) == [7.0]


def test_a_full_queue_refuses_at_once_and_serves_accepted_requests(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate, max_queued_tokens=40)
    running = submit(batcher, [sized(1, 30)])
    gate.wait_until_entered()
    accepted = [running]
    for number in range(200):
        with suppress(
            QueueFullError
        ):  # immediately: with the gate closed, a call that waits would not return
            accepted.append(submit(batcher, [sized(number, 10)]))
    assert len(accepted) == 5
    with pytest.raises(QueueFullError, match=r"40 tokens are waiting .* max_queued_tokens is 40"):
        batcher.accept(Request(), num_tokens=1)
    gate.let_through()
    assert results(accepted) == [[1.0], [0.0], [1.0], [2.0], [3.0]]
    assert submit(batcher, [ids(5)]).result(PATIENCE_S) == [5.0]


def test_cancelled_requests_are_not_computed(make: Callable[..., MicroBatcher], gate: Gate) -> None:
    batcher = make(gate, budget=20)
    running = submit(batcher, [sized(1, 10)])
    gate.wait_until_entered()
    doomed = submit(batcher, [sized(666, 10)] * 5)
    kept = submit(batcher, [sized(2, 10)])
    assert doomed.cancel()
    assert batcher.health().queued_tokens == 10
    gate.let_through()
    assert results([running, kept]) == [[1.0], [2.0]]
    assert all(666 not in batch for batch in gate.batches)
    with pytest.raises(CancelledError):
        doomed.result(0)
    stats = batcher.stats(cache_hits=0, cache_misses=0, splits=0)
    assert (stats.cancelled, stats.queued_requests, stats.queued_tokens) == (1, 0, 0)


def test_cancelling_a_running_request_drops_its_waiting_sequences(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate, budget=20)
    half = submit(batcher, [sized(1, 10)] * 10)
    gate.wait_until_entered()
    assert half.cancel()
    gate.let_through()
    assert submit(batcher, [ids(2)]).result(PATIENCE_S) == [2.0]
    assert sum(batch.count(1.0) for batch in gate.batches) == 2


def poisoned(batch: list[IntArray]) -> list[float]:
    if any(sequence[0] == 13 for sequence in batch):
        raise ValueError("poison")
    return firsts(batch)


@pytest.mark.parametrize("position", [0, 7, 15])
def test_one_bad_request_among_sixteen_fails_alone(
    make: Callable[..., MicroBatcher], gate: Gate, position: int
) -> None:
    batcher = make(lambda batch: poisoned(batch) and gate(batch))
    first = submit(batcher, [ids(1)])
    gate.wait_until_entered()
    futures = [submit(batcher, [ids(13 if number == position else 20 + number)]) for number in range(16)]
    gate.let_through()
    assert first.result(PATIENCE_S) == [1.0]
    for number, future in enumerate(futures):
        if number == position:
            with pytest.raises(ValueError, match="poison"):
                future.result(PATIENCE_S)
        else:
            assert future.result(PATIENCE_S) == [20.0 + number]
    assert batcher.stats(cache_hits=0, cache_misses=0, splits=0).failed == 1


def test_a_request_that_arrives_after_a_failure_shares_no_batch_with_the_suspects(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(lambda batch: gate(batch) and poisoned(batch))
    first = submit(batcher, [ids(1)])
    gate.wait_until_entered()
    bad, good = submit(batcher, [ids(13)]), submit(batcher, [ids(20)])
    gate.let_through(1)
    gate.wait_until_entered()
    late = [submit(batcher, [ids(30 + number)]) for number in range(3)]
    gate.let_through()
    assert results([first, good, *late]) == [[1.0], [20.0], [30.0], [31.0], [32.0]]
    assert isinstance(bad.exception(PATIENCE_S), ValueError)
    assert sorted(gate.batches[1]) == [13.0, 20.0]
    assert [batch for batch in gate.batches[2:] if 13.0 in batch] == [[13.0]]


def test_an_error_reaches_its_caller_unchanged(make: Callable[..., MicroBatcher]) -> None:
    error = KeyError("mine")

    def score(batch: list[IntArray]) -> list[float]:
        raise error

    future = submit(make(score), [ids(1)])
    assert future.exception(PATIENCE_S) is error


def test_too_few_scores_are_an_error(make: Callable[..., MicroBatcher]) -> None:
    future = submit(make(lambda batch: [1.0]), [ids(1), ids(2)])
    with pytest.raises(RuntimeError, match="2 sequences gave 1 scores"):
        future.result(PATIENCE_S)


def test_an_error_of_on_progress_fails_only_its_request(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate)
    first = submit(batcher, [ids(0)])
    gate.wait_until_entered()

    def broken(count: int) -> None:
        raise OSError("no terminal")

    faulty, other = submit(batcher, [ids(1)], broken), submit(batcher, [ids(2)])
    gate.let_through()
    assert results([first, other]) == [[0.0], [2.0]]
    with pytest.raises(OSError, match="no terminal"):
        faulty.result(PATIENCE_S)


def test_a_lost_device_fails_all_requests_at_once(make: Callable[..., MicroBatcher], gate: Gate) -> None:
    cause = RuntimeError("CUDA error: an illegal memory access was encountered")

    def score(batch: list[IntArray]) -> list[float]:
        gate(batch)
        raise cause

    batcher = make(score, budget=2, is_device_lost=is_device_lost)
    futures = [submit(batcher, [ids(number)]) for number in range(20)]
    gate.let_through()
    for future in futures:
        error = future.exception(PATIENCE_S)
        assert isinstance(error, DeviceLostError)
        assert error.__cause__ is cause
    assert batcher.health().state == "device lost"
    assert not batcher.health().ok
    assert len(gate.batches) == 1
    with pytest.raises(DeviceLostError):
        submit(batcher, [ids(1)])


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_errors_that_mean_a_lost_device(error: Exception, lost: bool) -> None:
    assert is_device_lost(error) is lost


def test_no_request_waits_for_a_dead_worker(make: Callable[..., MicroBatcher], gate: Gate) -> None:
    dying = threading.Event()

    def score(batch: list[IntArray]) -> list[float]:
        gate(batch)
        if dying.is_set():
            raise SystemExit
        return firsts(batch)

    batcher = make(score, budget=3)
    gate.let_through()
    for _ in range(20):
        dying.set()
        futures = [submit(batcher, [ids(number)]) for number in range(50)]
        done, waiting = wait(futures, timeout=PATIENCE_S)
        assert not waiting
        assert all(isinstance(future.exception(0), WorkerDiedError) for future in done)
        dying.clear()
        assert submit(batcher, [ids(5)]).result(PATIENCE_S) == [5.0], "the next call starts another worker"


def test_no_request_waits_for_a_killed_worker(make: Callable[..., MicroBatcher], gate: Gate) -> None:
    batcher = make(gate)
    futures = [submit(batcher, [ids(0)])]
    gate.wait_until_entered()
    futures += [submit(batcher, [ids(number)]) for number in range(50)]
    (worker,) = batcher._live_threads()
    assert worker.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
    gate.let_through()
    done, waiting = wait(futures, timeout=PATIENCE_S)
    assert not waiting
    assert {type(future.exception(0)) for future in done} <= {WorkerDiedError, type(None)}
    assert submit(batcher, [ids(5)]).result(PATIENCE_S) == [5.0]


def test_close_finishes_accepted_requests_and_refuses_new_ones(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate, budget=3)
    futures = [submit(batcher, [ids(number)]) for number in range(20)]
    gate.let_through()
    batcher.close()
    assert results(futures) == [[float(number)] for number in range(20)]
    with pytest.raises(ScorerClosedError):
        submit(batcher, [ids(1)])
    assert batcher.health().state == "closed"


def test_close_with_a_timeout_fails_unfinished_requests(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate, budget=3)
    futures = [submit(batcher, [ids(number)]) for number in range(20)]
    gate.wait_until_entered()
    batcher.close(timeout=0.05)
    assert all(isinstance(future.exception(0), ScorerClosedError) for future in futures)
    gate.let_through()


def test_an_unreferenced_batcher_is_freed() -> None:
    batcher = MicroBatcher([replica(firsts, 10)], idle_s=0.05)
    assert submit(batcher, [ids(3)]).result(PATIENCE_S) == [3.0]
    workers = batcher._live_threads()
    reference = weakref.ref(batcher)
    del batcher
    for worker in workers:
        worker.join(PATIENCE_S)
    gc.collect()
    assert reference() is None


def test_a_request_replaces_a_worker_that_ended_when_idle(make: Callable[..., MicroBatcher]) -> None:
    batcher = make(firsts, idle_s=0.001)
    for number in range(300):
        assert submit(batcher, [ids(number)]).result(PATIENCE_S) == [float(number)]
        if number % 3 == 0:
            time.sleep(
                0.002
            )  # about as long as `idle_s`, so that the worker sometimes ends and sometimes does not


class FlakyForward:
    """Returns the first id of each sequence. Sometimes it runs out of memory or raises another error."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.num_errors = self.num_out_of_memory = 0

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        draw = self.random.random()
        if draw < 0.03 and len(batch.seqlens.lengths) > 1:
            self.num_out_of_memory += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        if draw > 0.98:
            self.num_errors += 1
            raise FloatingPointError("injected")
        return batch.ids[batch.seqlens.cu_seqlens[:-1]].float()


def test_two_thousand_requests_through_injected_errors(make: Callable[..., MicroBatcher]) -> None:
    forward = FlakyForward()
    runner = Runner(forward, device=torch.device("cpu"), padding_idx=1, max_batch_tokens=200)
    batcher = MicroBatcher([replica_of(runner)], is_device_lost=is_device_lost)
    numbers = random.Random(1)
    requests = [[sized(number, numbers.randrange(1, 30)) for _ in range(3)] for number in range(2000)]
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(partial(submit, batcher), requests))
    outcomes = [future.exception(PATIENCE_S) for future in futures]
    assert forward.num_errors > 10
    assert forward.num_out_of_memory > 10
    for number, (future, error) in enumerate(zip(futures, outcomes, strict=True)):
        if error is None:
            assert future.result() == [float(number)] * 3
        else:
            assert isinstance(error, FloatingPointError)
    assert sum(error is not None for error in outcomes) < 200
    forward.random = random.Random(2)
    forward.random.random = lambda: 0.5  # type: ignore[method-assign]
    for _ in range(1000):
        submit(batcher, [ids(1)]).result(PATIENCE_S)
    assert runner.max_batch_tokens == 200, "the working budget recovers"
    batcher.close()


# --- through the scorer ------------------------------------------------------------------------------


def test_a_timeout_drops_the_rest_of_a_request(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        long = [("query", f"{text} {number}") for number in range(30) for text in texts]
        with pytest.raises(RequestTimeoutError, match="did not finish within its timeout"):
            scorer.score(long, timeout=0.01)
        with pytest.raises(TimeoutError):
            scorer.rank("query", [text for _, text in long], timeout=0.0)
        assert scorer.score(long[:2], timeout=60) == scorer.score(long[:2])
        stats = scorer.stats()
        assert stats.cancelled >= 1
        assert (stats.queued_requests, stats.queued_tokens) == (0, 0)
        assert stats.pairs < len(long), "the rest was never computed"


async def test_a_timeout_ends_an_async_call(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        passages = [f"{text} {number}" for number in range(30) for text in texts]
        with pytest.raises(RequestTimeoutError):
            await scorer.arank("query", passages, timeout=0.01)
        with pytest.raises(RequestTimeoutError):
            await scorer.ascore([("query", passage) for passage in passages], timeout=0.01)
        with pytest.raises(RequestTimeoutError):
            await scorer.arank_many([("query", passages)], timeout=0.01)
        assert [p.index for p in await scorer.arank("query", passages[:3], timeout=60)]
        assert scorer.health().queued_requests == 0


@pytest.mark.parametrize("timeout", [-1, float("nan"), "3", True])
def test_an_invalid_timeout_is_refused(scorer: Scorer, timeout: Any) -> None:
    with pytest.raises(InputError, match="timeout must"):
        scorer.score([("a", "b")], timeout=timeout)


async def test_cancelled_tasks_leave_nothing_in_the_queue(checkpoint: Path, texts: list[str]) -> None:
    """Of 200 async calls, 60 are cancelled at random times."""
    chooser = random.Random(0)
    with Scorer(checkpoint, device="cpu", dtype="float32", max_batch_tokens=512) as scorer:
        expected = scorer.score([("query", text) for text in texts])
        tasks = [
            asyncio.create_task(scorer.ascore([("query", texts[(n + i) % len(texts)]) for i in range(3)]))
            for n in range(200)
        ]
        doomed = set(chooser.sample(range(200), 60))
        for n in sorted(doomed, key=lambda _: chooser.random()):
            await asyncio.sleep(chooser.random() / 200)
            tasks[n].cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
        for n, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                assert n in doomed
                assert isinstance(outcome, asyncio.CancelledError)
            else:
                wanted = [expected[(n + i) % len(texts)] for i in range(3)]
                assert outcome == pytest.approx(wanted, abs=LOGIT_TOLERANCE[torch.float32])
        assert (scorer.stats().queued_requests, scorer.stats().queued_tokens) == (0, 0)


def test_requests_share_batches(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_wait_ms=50) as scorer:
        barrier = threading.Barrier(16)

        def ask(number: int) -> list[float]:
            barrier.wait()
            return scorer.score([("query", texts[number])])

        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(ask, range(16)))
        stats = scorer.stats()
        assert stats.batches < 16
        assert stats.requests_per_batch > 1
        alone = [scorer.score([("query", texts[number])]) for number in range(16)]
        assert np.array(together) == pytest.approx(np.array(alone), abs=LOGIT_TOLERANCE[torch.float32])


def test_a_scorer_refuses_requests_beyond_max_queued_tokens(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_queued_tokens=1000) as scorer:
        with pytest.raises(QueueFullError):
            scorer.score([("query", text) for text in texts])
        assert len(scorer.score([("query", texts[0])])) == 1


def test_a_full_queue_takes_a_request_without_sequences(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate, max_queued_tokens=40)
    futures = [submit(batcher, [sized(1, 40)])]
    gate.wait_until_entered()
    futures.append(submit(batcher, [sized(2, 40)]))
    with pytest.raises(QueueFullError):
        batcher.accept(Request(), num_tokens=1)
    batcher.accept(Request(), num_tokens=0)
    assert submit(batcher, []).result(PATIENCE_S) == []
    gate.let_through()
    assert results(futures) == [[1.0], [2.0]]


def test_callers_of_a_closed_batcher_share_no_exception(
    make: Callable[..., MicroBatcher], gate: Gate
) -> None:
    batcher = make(gate)
    futures = [submit(batcher, [sized(number, 10)]) for number in range(3)]
    gate.wait_until_entered()
    batcher.close(timeout=0)
    gate.let_through()
    errors = [future.exception(PATIENCE_S) for future in futures]
    assert [type(error) for error in errors] == [ScorerClosedError] * 3
    assert len(set(map(id, errors))) == 3


def test_a_sequence_beyond_the_budget_fills_a_batch_no_more_than_once(checkpoint: Path) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_batch_tokens=64) as scorer:
        scorer.score([("query", "word " * 400)])
        assert scorer.stats().fill == 1


def test_stats_count_duplicates_and_truncations(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_length=64) as scorer:
        scorer.score([("query", texts[0]), ("query", "short"), ("query", "short")])
        stats = scorer.stats()
        assert (stats.duplicates, stats.truncations, stats.pairs, stats.requests) == (1, 1, 2, 1)
        assert pickle.loads(pickle.dumps(stats)) == stats
        assert stats.to_dict()["waiting"] == {
            "p50_ms": stats.waiting.p50_ms,
            "p90_ms": stats.waiting.p90_ms,
            "p99_ms": stats.waiting.p99_ms,
        }
    assert scorer.health().state == "closed"


def test_repeated_passages_are_not_tokenized_again(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        first = scorer.score([("query", text) for text in texts])
        assert (scorer.stats().cache_hits, scorer.stats().cache_hit_rate) == (0, 0.0)
        assert scorer.score([("query", text) for text in texts]) == first
        assert scorer.stats().cache_hits == scorer.stats().cache_misses == len(texts)
        assert scorer.stats().to_dict()["cache_hit_rate"] == 0.5
        scorer.score([("other", texts[0]), ("another", texts[0]), ("other", "new")])
        assert scorer.stats().cache_hits == len(texts) + 1


def run_python(code: str, checkpoint: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a separate process. The test fails if the process does not end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(checkpoint), *args],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_interpreter_exits_with_requests_in_the_queue(checkpoint: Path) -> None:
    code = """
        import sys, threading, time
        from bge_rerank_integrations import Scorer
        scorer = Scorer(sys.argv[1], device="cpu", max_batch_tokens=512)
        def ask(n):
            while True:  # some are queued at the end, some are tokenizing, some are about to ask again
                scorer.score([(f"query {n}", "word " * 300 + str(i)) for i in range(4)])
        for n in range(100):
            threading.Thread(target=ask, args=(n,), daemon=True).start()
        while scorer.health().queued_requests < 50:
            time.sleep(0.01)
    """
    completed = run_python(code, checkpoint)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_threads_that_outlive_the_main_thread_are_served(checkpoint: Path) -> None:
    code = """
        import sys, threading, time
        from bge_rerank_integrations import Scorer
        scorer = Scorer(sys.argv[1], device="cpu")
        def work():
            threading.main_thread().join()
            print(len(scorer.score([("a", "b"), ("a", "c")])))
        threading.Thread(target=work).start()
    """
    completed = run_python(code, checkpoint)
    assert (completed.returncode, completed.stdout.strip(), completed.stderr) == (0, "2", "")


async def test_a_call_that_cannot_start_a_thread_says_so_and_leaves_no_work(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse_tokenizers(thread: threading.Thread) -> None:
        if thread.name.startswith("bge-rerank-tokenize"):
            refuse_to_start(thread)
        start(thread)

    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse_tokenizers)
            for _ in range(3):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    await scorer.arank("a", ["b", "c"])
        assert len(await scorer.arank("a", ["d"])) == 1
        assert scorer.stats().pairs == 1


@pytest.mark.parametrize("event", ["call", "return"])
@pytest.mark.parametrize("method", ["__enter__", "__exit__"])
@pytest.mark.parametrize("caller", ["accept", "add", "count", "result", "cancel", "done"])
def test_an_interrupt_at_a_lock_does_not_stop_other_threads(
    checkpoint: Path, caller: str, method: str, event: str
) -> None:
    """Ctrl-C can reach the main thread when it has just taken the lock of a condition variable."""
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        (expected,) = scorer.score([("a", "b")])

        def trace(frame: FrameType, kind: str, _: object) -> Any:
            code, called_by = frame.f_code, frame.f_back
            if code.co_name == method and Path(code.co_filename).name == "threading.py":
                assert called_by is not None
                if called_by.f_code.co_name == caller:
                    if kind == event:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                    return trace
            return None

        tracer = sys.gettrace()
        sys.settrace(trace)
        try:
            with suppress(KeyboardInterrupt):
                scorer.score([("a", "b")])
        finally:
            sys.settrace(tracer)
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(scorer.score, [("a", "b")], timeout=PATIENCE_S)
            assert again.result() == [expected]


@pytest.mark.parametrize("method", ["add", "drop"])
@pytest.mark.parametrize("others", [0, 1])
def test_an_interrupted_call_leaves_no_tokens_in_the_queue(method: str, others: int) -> None:
    steps = {RequestQueue.add, RequestQueue.drop, RequestQueue._count, Request.queue, Request.clear}
    for line in count():
        queue = RequestQueue()
        waiting = [Request() for _ in range(others)]
        for each in waiting:
            queue.add(each, each.grow([ids(7), ids(8)]))
        request = Request()
        added = request.grow([ids(1), ids(2), ids(3)])
        call: Callable[[], object] = partial(queue.add, request, added)
        if method == "drop":
            queue.add(request, added)
            call = partial(queue.drop, request)
        if not call_at(line, steps, stop, call):
            break
        queue.drop(request)  # its caller was interrupted, so its future is cancelled
        while queue:
            assert request not in queue.take(2)
        assert (len(queue), queue.num_tokens) == (0, 0)
        queue.add(request := Request(), request.grow([ids(1)]))
        assert queue.num_tokens == len(ids(1))
    assert line > 4


def test_a_signal_handler_can_close_a_scorer_in_a_thread_at_any_time() -> None:
    steps = {MicroBatcher.add, MicroBatcher._wake_workers, MicroBatcher._check_open, RequestQueue.add}
    for line in count():
        batcher = MicroBatcher([replica(firsts, 100)])
        futures: list[Any] = []

        def ask(batcher: MicroBatcher = batcher, futures: list[Any] = futures) -> None:
            with suppress(ScorerClosedError):
                futures.append(submit(batcher, [ids(4), ids(5)]))

        is_reached = call_at(line, steps, threading.Thread(target=batcher.close).start, ask)
        for future in futures:
            with suppress(ScorerClosedError):
                assert future.result(PATIENCE_S) == [4.0, 5.0]
        if not is_reached:
            batcher.close()
            break
        deadline = time.monotonic() + PATIENCE_S
        while batcher.health().replicas_alive and time.monotonic() < deadline:
            time.sleep(0.001)
        assert batcher.health().replicas_alive == 0
        with pytest.raises(ScorerClosedError):
            submit(batcher, [ids(1)])
    assert line > 10


def test_an_interrupted_close_leaves_no_caller_waiting() -> None:
    for number in count():
        gate = Gate()
        batcher = MicroBatcher([replica(gate, 2)])
        futures = [submit(batcher, [ids(value), ids(value)]) for value in range(3)]
        gate.wait_until_entered()
        interrupt = Interrupt(number)

        def close(batcher: MicroBatcher = batcher, arm: Callable[[], None] = interrupt.arm) -> None:
            arm()
            batcher.close(0.0)

        interrupt.call(close)
        batcher.close(0.0)
        for future in futures:
            with pytest.raises(ScorerClosedError):
                future.result(PATIENCE_S)
        gate.let_through()
        if not interrupt.is_reached:
            break
    assert number > 10


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_that_a_condition_hides_is_raised(interrupt: type[BaseException]) -> None:
    future: Future[int] = Future()
    future.set_exception(error := RuntimeError("cannot release un-acquired lock"))
    error.__context__ = interrupt()
    with pytest.raises(interrupt):
        timeouts.wait(future, None)
    failed: Future[int] = Future()
    failed.set_exception(WorkerDiedError("the worker died"))
    try:
        raise interrupt
    except interrupt:  # an application that cleans up after an interrupt
        with pytest.raises(WorkerDiedError):
            timeouts.wait(failed, None)


def test_a_condition_wakes_up_a_thread_that_waits() -> None:
    condition, seen = SafeCondition(), list[bool]()

    def wait() -> None:
        with condition, condition:
            seen.append(condition.wait(PATIENCE_S))

    thread = threading.Thread(target=wait)
    thread.start()
    while thread.is_alive() and not seen:
        with condition:
            condition.notify_all()
    thread.join()
    assert seen == [True]
    with condition:
        assert not condition.wait(0.001)


def test_two_first_models_load_at_the_same_time(checkpoint: Path) -> None:
    code = """
        import asyncio, sys
        from bge_rerank_integrations import Scorer, ScorerConfig
        async def main():
            configs = [ScorerConfig(model=sys.argv[1], device="cpu", max_length=length) for length in (64, 128)]
            scorers = await asyncio.gather(*map(Scorer.ashared, configs))
            print(len(scorers))
        asyncio.run(main())
    """
    completed = run_python(code, checkpoint)
    assert (completed.returncode, completed.stdout.strip()) == (0, "2"), completed.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parent", ["loaded", "scored"])
def test_a_forked_child_gets_a_typed_error(checkpoint: Path, parent: str) -> None:
    code = """
        import os, sys, time
        from bge_rerank_integrations import Scorer
        from bge_rerank_integrations.errors import ForkedProcessError
        scorer = Scorer(sys.argv[1], device="cpu")
        if sys.argv[2] == "scored":
            scorer.score([("a", "b")])
        child = os.fork()
        if child == 0:
            for call in (
                lambda: scorer.score([("a", "b")]),
                lambda: Scorer(sys.argv[1], device="cpu"),
                scorer.stats,
                scorer.health,
            ):
                try:
                    call()
                    os._exit(1)
                except ForkedProcessError as error:
                    assert "had loaded a model" in str(error)
                    for advice in ("post_worker_init", "worker_process_init", "worker_init_fn", "spawn"):
                        assert advice in str(error), advice
            scorer.close()
            os._exit(0)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                print(status, len(scorer.score([("a", "b")])))
                break
            time.sleep(0.01)
    """
    completed = run_python(code, checkpoint, parent)
    assert (completed.returncode, completed.stdout.strip()) == (0, "0 1")
    assert ForkedProcessError.__name__ not in completed.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forked_child_loads_a_model_after_its_parent_has_used_several_threads(
    checkpoint: Path, dtype: str
) -> None:
    code = """
        import os, signal, sys
        import torch
        from bge_rerank_integrations import Scorer
        torch.set_num_threads(2)
        matrix = torch.ones(2000, 2000)
        torch.nn.functional.gelu(matrix @ matrix)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            with Scorer(sys.argv[1], device="cpu", dtype=sys.argv[2], num_threads=2) as scorer:
                scores = scorer.score([("a", "b")]) + scorer.score([("a", "b"), ("a", "c")])
            os._exit(0 if len(scores) == 3 else 1)
        print(os.waitpid(child, 0)[1])
    """
    completed = run_python(code, checkpoint, dtype)
    assert (completed.returncode, completed.stdout.strip()) == (0, "0"), completed.stderr
