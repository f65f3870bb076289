"""Figures 2, 4, 5, 6 and 7: every queued request ends with a result, an error or its cancellation."""

from __future__ import annotations

import asyncio
import ctypes
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Final

import numpy as np
import torch

from benchmarks.stress.common import MAX_DIFFERENCE, PATIENCE_S, Bench, Outcome, difference
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.workers import Replica
from bge_rerank_integrations.engine.packing import PackedBatch
from bge_rerank_integrations.engine.runner import Runner, is_device_lost
from bge_rerank_integrations.errors import QueueFullError, WorkerDiedError
from bge_rerank_integrations.text.tokenization import IntArray

CPU: Final = torch.device("cpu")

MAX_REFUSAL_S: Final = 0.01
# Time that may pass between adding a request to a batch and the start of the forward pass.
START_GRACE_S: Final = 0.05

POISON: Final = 7


# 2: cancellation.


class _Done:
    """A batch whose logits are known."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = logits

    def wait(self) -> list[float]:
        """Return the logits."""
        return self._logits


def _replica(score: Callable[[list[IntArray]], list[float]], max_batch_tokens: int) -> Replica:
    return Replica(
        lambda sequences, *, is_alone: _Done(score(sequences)),  # noqa: ARG005
        lambda: max_batch_tokens,
    )


def cancelled_calls(bench: Bench) -> Outcome:
    """Cancel 30 % of async calls at random. Check that no cancelled call starts afterwards."""
    num_calls = bench.count(1000)
    begun_at: dict[float, float] = {}

    def score(batch: list[IntArray]) -> list[float]:
        begun_at.update((value, begun_at.get(value, time.monotonic())) for value in set(_firsts(batch)))
        time.sleep(0.005)
        return _firsts(batch)

    async def run_queue(batcher: MicroBatcher) -> tuple[list[Any], dict[int, float]]:
        futures = [batcher.submit([_sized(n, 10)] * 3) for n in range(num_calls)]
        tasks = [asyncio.ensure_future(asyncio.wrap_future(future)) for future in futures]
        return await _cancel_some(tasks)

    batcher = MicroBatcher([_replica(score, 100)])
    outcomes, cancelled_at = asyncio.run(run_queue(batcher))
    emptied_s = _seconds_until_empty(batcher)
    batcher.close()
    num_computed = sum(begun_at.get(n, 0.0) > at + START_GRACE_S for n, at in cancelled_at.items())
    num_wrong = _count_wrong(outcomes, cancelled_at, [[float(n)] * 3 for n in range(num_calls)])

    requests = [[("query", text) for text in bench.texts[n % 60 :][:3]] for n in range(num_calls)]
    scores = dict(
        zip(bench.texts, bench.scorer.score([("query", text) for text in bench.texts]), strict=True)
    )

    async def run_scorer(scorer: Scorer) -> tuple[list[Any], dict[int, float]]:
        return await _cancel_some([asyncio.create_task(scorer.ascore(request)) for request in requests])

    with Scorer(bench.checkpoint, device="cpu", max_batch_tokens=512) as scorer:
        outcomes, cancelled = asyncio.run(run_scorer(scorer))
        emptied_s = max(emptied_s, _seconds_until_empty(scorer))
    num_wrong += _count_wrong(outcomes, cancelled, [[scores[text] for _, text in each] for each in requests])
    return Outcome(
        num_wrong == 0 and num_computed == 0 and emptied_s <= 1,
        f"queue: {num_calls} calls, {len(cancelled_at)} cancelled; scorer: {num_calls} calls, "
        f"{len(cancelled)} cancelled; "
        f"{num_wrong} wrong or hung, {num_computed} scored after cancellation; queue empty after "
        f"{emptied_s:.3f} s",
    )


async def _cancel_some(tasks: Sequence[asyncio.Future[Any]]) -> tuple[list[Any], dict[int, float]]:
    """Cancel 30 % of the tasks before they are done. Return all outcomes, and the times of cancellation."""
    rng = random.Random(2)
    cancelled_at: dict[int, float] = {}

    def noting(n: int) -> Callable[[object], None]:
        return lambda _: cancelled_at.update({n: time.monotonic()})

    for _ in range(len(tasks) * 3 // 10):
        await asyncio.sleep(rng.uniform(0.0, 0.006))
        waiting = [n for n, task in enumerate(tasks) if n not in cancelled_at and not task.done()]
        if not waiting:
            break
        n = rng.choice(waiting)
        tasks[n].add_done_callback(noting(n))
        tasks[n].cancel()
        await asyncio.sleep(0)
    await asyncio.wait(tasks, timeout=PATIENCE_S)
    return [
        task.done() and (task.cancelled() or task.exception() or task.result()) for task in tasks
    ], cancelled_at


def _count_wrong(outcomes: Sequence[Any], cancelled: Iterable[int], expected: Sequence[list[float]]) -> int:
    """Count outcomes that are wrong: not cancelled although requested, or without the expected scores."""
    return sum(
        outcome is not True
        if n in cancelled
        else not isinstance(outcome, list) or difference(outcome, expected[n]) > MAX_DIFFERENCE
        for n, outcome in enumerate(outcomes)
    )


def _seconds_until_empty(queue: MicroBatcher | Scorer) -> float:
    began = time.monotonic()
    while queue.health().queued_tokens and time.monotonic() - began < PATIENCE_S:
        time.sleep(0.001)
    return time.monotonic() - began


# 4: admission.


def queue_cap(bench: Bench) -> Outcome:
    """Check that requests beyond the queue's limit are refused at once and that the others are right."""

    def score(batch: list[IntArray]) -> list[float]:
        time.sleep(0.005)
        return _firsts(batch)

    num_offered = bench.count(1000)
    batcher = MicroBatcher([_replica(score, 100)], max_queued_tokens=max(num_offered, 10))
    accepted: list[tuple[int, Future[list[float]]]] = []
    refusals: list[float] = []
    for number in range(num_offered):
        began = time.perf_counter()
        try:
            accepted.append((number, batcher.submit([_sized(number, 10)])))
        except QueueFullError:
            refusals.append(time.perf_counter() - began)
    num_wrong = sum(future.result(PATIENCE_S) != [float(number)] for number, future in accepted)
    health = batcher.health()
    batcher.close()
    slowest = max(refusals, default=0.0)
    return Outcome(
        len(refusals) > 0 and slowest <= MAX_REFUSAL_S and num_wrong == 0 and health.queued_tokens == 0,
        f"{num_offered} offered, {len(refusals)} refused, the slowest in {1000 * slowest:.2f} ms; "
        f"{len(accepted)} accepted, {num_wrong} wrong",
    )


# 5 to 7: a failure affects only its own request, and no request waits without end.


class PoisonError(Exception):
    """The error of a batch with a poisoned pair."""


def poisoned_batches(bench: Bench) -> Outcome:
    """Check that only one of sixteen callers in a batch fails if its pair makes the batch fail."""
    sizes: list[int] = []

    def score(batch: list[IntArray]) -> list[float]:
        sizes.append(len(batch))
        if any(sequence[0] == POISON for sequence in batch):
            raise PoisonError
        return _firsts(batch)

    # A batch has room for exactly sixteen callers, and it starts only when it is full.
    batcher = MicroBatcher([_replica(score, 160)], max_wait_ms=10_000)
    num_rounds = bench.count(200)
    tally: Counter[str] = Counter()
    with ThreadPoolExecutor(16) as pool:
        for number in range(num_rounds):
            values = [POISON if caller == number % 16 else 100 + caller for caller in range(16)]
            futures = pool.map(lambda value: batcher.submit([_sized(value, 10)]), values)
            for value, future in zip(values, futures, strict=True):
                error = future.exception(PATIENCE_S)
                if value == POISON:
                    tally["typed" if isinstance(error, PoisonError) else "wrong"] += 1
                else:
                    is_right = error is None and future.result() == [float(value)]
                    tally["right" if is_right else "wrong"] += 1
    batcher.close()
    shared = sizes.count(16)
    return Outcome(
        shared == num_rounds and tally == Counter(right=15 * num_rounds, typed=num_rounds),
        f"{shared} shared batches: {tally['right']} right, {tally['typed']} typed errors, "
        f"{tally['wrong']} wrong",
    )


class FlakyForward:
    """Scores a sequence with its first id. Some large batches run out of memory; poisoned batches fail."""

    def __init__(self, num_out_of_memory: int) -> None:
        self.random = random.Random(3)
        self.num_left = num_out_of_memory

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Score a packed batch or raise an error."""
        if self.num_left and len(batch.ids) > 60 and self.random.random() < 0.5:
            self.num_left -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        if bool((batch.ids == POISON).any()):
            raise PoisonError
        return batch.ids[batch.seqlens.cu_seqlens[:-1].long()].float()


def injected_errors(bench: Bench) -> Outcome:
    """Check results during out-of-memory and other errors, and that the token budget recovers afterwards."""
    num_requests, num_bad = bench.count(2000), bench.count(100)
    forward = FlakyForward(num_out_of_memory=num_bad)
    runner = Runner(forward, device=CPU, padding_idx=1, max_batch_tokens=512)
    budgets: list[int] = []

    def budget() -> int:
        budgets.append(runner.max_batch_tokens)
        return runner.max_batch_tokens

    batcher = MicroBatcher([Replica(runner.launch, budget)], is_device_lost=is_device_lost)
    rng = random.Random(4)
    poisoned = set(rng.sample(range(num_requests), num_bad))
    requests = [
        [
            _sized(POISON if n in poisoned else 100 + n, rng.randrange(1, 40))
            for _ in range(rng.randrange(8, 17))
        ]
        for n in range(num_requests)
    ]
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(batcher.submit, requests))
    tally = Counter(_kind_of_end(future, request) for future, request in zip(futures, requests, strict=True))
    num_injected, forward.num_left = num_bad - forward.num_left, 0
    num_more = 0
    while runner.max_batch_tokens < 512 and num_more < 20_000:
        batcher.submit([_sized(100, 1)]).result(PATIENCE_S)
        num_more += 1
    batcher.close()
    return Outcome(
        tally == Counter(right=num_requests - num_bad, typed=num_bad)
        and num_injected == num_bad
        and runner.max_batch_tokens == 512,
        f"{num_requests} requests, {num_injected} out-of-memory errors, {num_bad} poisoned: {tally['right']} "
        f"right, {tally['typed']} typed errors, {tally['wrong']} wrong; budget 512 tokens, at least "
        f"{min(budgets)}, {runner.max_batch_tokens} again after {num_more} more requests",
    )


def _kind_of_end(future: Future[list[float]], request: Sequence[IntArray]) -> str:
    error, values = future.exception(PATIENCE_S), _firsts(request)
    if values[0] == POISON:
        return "typed" if isinstance(error, PoisonError) else "wrong"
    return "right" if error is None and future.result() == values else "wrong"


class Worker:
    """A slow score function whose worker thread can be stopped from inside or outside."""

    def __init__(self) -> None:
        self.thread_id = 0
        self.is_dying = False

    def __call__(self, batch: list[IntArray]) -> list[float]:
        """Score a batch in five milliseconds."""
        self.thread_id = threading.get_ident()
        for _ in range(5):
            time.sleep(0.001)
        if self.is_dying:
            self.is_dying = False
            raise SystemExit
        return _firsts(batch)

    def exit(self) -> None:
        """End the thread in the next batch."""
        self.is_dying = True

    def kill(self) -> None:
        """Raise `SystemExit` in the thread, at any line."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.thread_id), ctypes.py_object(SystemExit)
        )


def killed_workers(bench: Bench) -> Outcome:
    """Check that fifty waiting requests end soon after the worker's thread ends."""
    worker = Worker()
    batcher = MicroBatcher([_replica(worker, 3)])
    rng = random.Random(5)
    num_kills = bench.count(20)
    waits: list[float] = []
    tally: Counter[str] = Counter()
    for end in [worker.exit] * num_kills + [worker.kill] * num_kills:
        ended_at: list[float] = []
        futures = [batcher.submit([_sized(100, 1)]) for _ in range(50)]
        for future in futures:
            future.add_done_callback(_noting_time(ended_at))
        time.sleep(rng.uniform(0.005, 0.03))
        killed_at = time.monotonic()
        end()
        tally["hung"] += len(wait(futures, PATIENCE_S).not_done)
        waits.append(max(ended_at) - killed_at)
        tally.update(_end_of_waiter(future) for future in futures if future.done())
        tally["not restarted"] += _end_of_waiter(batcher.submit([_sized(100, 1)])) != "right"
    batcher.close()
    return Outcome(
        max(waits) <= 1 and not any(tally[bad] for bad in ("hung", "wrong", "not restarted")),
        f"{num_kills} exits and {num_kills} kills: longest wait {max(waits):.3f} s; {tally['right']} served, "
        f"{tally['typed']} typed errors, {tally['wrong']} wrong, {tally['hung']} hung, "
        f"{tally['not restarted']} not restarted",
    )


def _noting_time(times: list[float]) -> Callable[[object], None]:
    return lambda _: times.append(time.monotonic())


def _end_of_waiter(future: Future[list[float]]) -> str:
    error = future.exception(PATIENCE_S)
    if error is None:
        return "right" if future.result() == [100.0] else "wrong"
    return "typed" if isinstance(error, WorkerDiedError) else "wrong"


def _sized(value: int, length: int) -> IntArray:
    return np.full(length, value, dtype=np.int32)


def _firsts(batch: Iterable[IntArray]) -> list[float]:
    return [float(sequence[0]) for sequence in batch]
