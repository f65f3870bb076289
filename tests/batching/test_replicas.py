"""Several devices with one queue: shared work, lost devices, and the ends of requests."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.inference import Pipeline
from bge_rerank_integrations.batching.queue import RequestQueue
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.stats import ScorerStats
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.runner import Pending, Runner, is_device_lost, load_runner, load_runners
from bge_rerank_integrations.errors import DeviceError, DeviceLostError, ScorerClosedError, WorkerDiedError
from bge_rerank_integrations.text.pairs import PreparedPairs
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import IntArray, PairTokenizer
from tests.support.queues import PATIENCE_S, Gate, firsts, ids, lost, replica, results, sized, submit
from tests.support.tolerances import LOGIT_TOLERANCE

TOLERANCE = LOGIT_TOLERANCE[torch.float32]

Make = Callable[..., MicroBatcher]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a function that creates batchers from score functions. They are closed after the test."""
    made: list[MicroBatcher] = []

    def build(
        *scores: Callable[[list[IntArray]], list[float]], budgets: tuple[int, ...] = (100,), **options: Any
    ) -> MicroBatcher:
        all_budgets = budgets if len(budgets) == len(scores) else budgets * len(scores)
        replicas = list(map(replica, scores, all_budgets))
        made.append(MicroBatcher(replicas, is_device_lost=is_device_lost, **options))
        return made[-1]

    yield build
    for batcher in made:
        batcher.close(timeout=1.0)


@pytest.fixture
def gates() -> list[Gate]:
    """Return two devices whose batches wait until the test lets them through."""
    return [Gate(), Gate()]


def stats_of(batcher: MicroBatcher) -> ScorerStats:
    return batcher.stats(cache_hits=0, cache_misses=0, splits=0)


def occupy(batcher: MicroBatcher, gates: list[Gate]) -> list[Future[list[float]]]:
    """Give each device a batch. Return the requests in the order of the gates."""
    futures = [submit(batcher, [sized(number, 100)]) for number in range(len(gates))]
    for gate in gates:
        gate.wait_until_entered()
    return [futures[int(gate.current[0])] for gate in gates]


# --- work is shared ----------------------------------------------------------------------------------


def test_two_batches_of_one_request_run_at_the_same_time(make: Make, gates: list[Gate]) -> None:
    future = submit(make(*gates), [sized(number, 60) for number in range(4)])
    for gate in gates:
        gate.wait_until_entered()  # although the gates are still closed
    for gate in gates:
        gate.let_through()
    assert future.result(PATIENCE_S) == [0.0, 1.0, 2.0, 3.0]
    assert all(gate.batches for gate in gates)


def test_results_of_three_replicas_come_back_in_order(make: Make) -> None:
    together = threading.Barrier(3)
    computed = [0, 0, 0]

    def device(number: int) -> Callable[[list[IntArray]], list[float]]:
        def score(batch: list[IntArray]) -> list[float]:
            if not computed[number]:
                together.wait(PATIENCE_S)
            computed[number] += len(batch)
            return firsts(batch)

        return score

    batcher = make(*map(device, range(3)), budgets=(50, 70, 90))
    numbers = random.Random(0)
    requests = [
        [sized(numbers.randrange(1000), numbers.randrange(1, 60)) for _ in range(100)] for _ in range(20)
    ]
    futures = [submit(batcher, request) for request in requests]
    assert results(futures) == [firsts(request) for request in requests]
    assert all(computed)
    stats = stats_of(batcher)
    assert (stats.requests, stats.pairs, stats.queued_tokens) == (20, 2000, 0) == (20, sum(computed), 0)


def test_each_replica_keeps_to_its_own_budget(make: Make) -> None:
    seen: list[list[int]] = [[], []]
    together = threading.Barrier(2)

    def device(number: int) -> Callable[[list[IntArray]], list[float]]:
        def score(batch: list[IntArray]) -> list[float]:
            if not seen[number]:
                together.wait(PATIENCE_S)
            seen[number].append(sum(map(len, batch)))
            return firsts(batch)

        return score

    submit(make(device(0), device(1), budgets=(20, 90)), [sized(1, 10)] * 100).result(PATIENCE_S)
    assert max(seen[0]) == 20
    assert max(seen[1]) == 90


def test_idle_replicas_share_waiting_sequences_evenly(make: Make) -> None:
    gates = [Gate() for _ in range(4)]
    sizes: list[int] = []

    def device(gate: Gate) -> Callable[[list[IntArray]], list[float]]:
        def score(batch: list[IntArray]) -> list[float]:
            sizes.append(sum(map(len, batch)))
            return gate(batch)

        return score

    batcher = make(*map(device, gates), budgets=(32_768,))
    future = submit(batcher, [sized(number, 150) for number in range(100)])
    for gate in gates:
        gate.wait_until_entered()
    assert sum(sizes) == 15_000
    assert max(sizes) - min(sizes) <= 300
    for gate in gates:
        gate.let_through()
    assert future.result(PATIENCE_S) == [float(number) for number in range(100)]


def test_waiting_sequences_are_not_reserved_for_a_busy_replica(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates, budgets=(32_768,), max_wait_ms=0.0)
    occupying = [submit(batcher, [sized(number, 150) for number in range(100)])]
    for gate in gates:
        gate.wait_until_entered()
    gates[1].let_through(1)
    occupying.append(submit(batcher, [sized(number, 150) for number in range(100)]))
    gates[1].wait_until_entered()
    assert len(gates[1].current) == 100
    for gate in gates:
        gate.let_through()
    results(occupying)


@pytest.mark.parametrize(
    ("num_tokens", "num_idle", "share"),
    [
        (15_000, 4, 3750),
        (15_001, 4, 3751),
        (15_000, 1, 15_000),
        (4096, 4, 2048),
        (4095, 4, 4095),
        (5000, 4, 2500),
        (10, 4, 10),
        (1_000_000, 4, 250_000),
    ],
)
def test_waiting_tokens_are_shared_only_if_each_share_is_large_enough(
    num_tokens: int, num_idle: int, share: int
) -> None:
    waiting = RequestQueue()
    request = Request()
    waiting.add(request, request.grow([sized(1, num_tokens)]))
    assert waiting.even_share(num_idle) == share


def test_a_lonely_short_request_is_one_batch(make: Make) -> None:
    batches: list[int] = []

    def score(batch: list[IntArray]) -> list[float]:
        batches.append(len(batch))
        return firsts(batch)

    submit(make(score, score, score, budgets=(32_768,)), [sized(1, 100)] * 30).result(PATIENCE_S)
    assert batches == [30]


def test_progress_is_reported_by_one_thread_at_a_time_and_before_the_end(make: Make) -> None:
    inside = threading.Lock()
    counts: list[int] = []
    future: Future[list[float]]

    def on_progress(count: int) -> None:
        assert inside.acquire(blocking=False)
        counts.append(count)
        inside.release()

    future = submit(make(firsts, firsts, firsts, budgets=(3,)), [ids(n) for n in range(3000)], on_progress)
    assert future.result(PATIENCE_S) == [float(n) for n in range(3000)]
    assert sum(counts) == 3000


# --- a device is lost --------------------------------------------------------------------------------


def test_the_batch_of_a_lost_device_goes_to_the_other(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    first, second = occupy(batcher, gates)
    waiting = submit(batcher, [ids(7), ids(8)])
    expected = [gates[0].current, gates[1].current, [7.0, 8.0]]
    gates[0].error = lost()
    for gate in gates:
        gate.let_through()
    assert results([first, second, waiting]) == expected
    health = batcher.health()
    assert (health.state, health.ok, health.replicas, health.replicas_alive) == ("ok", True, 2, 1)
    assert results([submit(batcher, [ids(n)]) for n in range(20)]) == [[float(n)] for n in range(20)]
    assert gates[0].batches == [], "nothing more is asked of it"
    stats = stats_of(batcher)
    assert (stats.lost_replicas, stats.failed, stats.queued_tokens) == (1, 0, 0)


def test_an_idle_replica_wakes_up_for_the_batch_of_a_lost_one(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates, idle_s=0.01)
    first, second = occupy(batcher, gates)
    (worker,) = [
        worker.threads[0] for replica, worker in batcher._workers.items() if replica is batcher._replicas[1]
    ]
    gates[1].let_through()
    second.result(PATIENCE_S)
    worker.join(PATIENCE_S)  # it now has no work
    expected = gates[0].current
    gates[0].error = lost()
    gates[0].let_through()
    assert first.result(PATIENCE_S) == expected
    assert expected in gates[1].batches


def test_losing_the_last_device_fails_all_requests(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates, budgets=(100,))
    futures = [*occupy(batcher, gates), *(submit(batcher, [ids(n)]) for n in range(20))]
    for gate in gates:
        gate.error = lost()
        gate.let_through()
    for future in futures:
        error = future.exception(PATIENCE_S)
        assert isinstance(error, DeviceLostError)
        assert is_device_lost(cast(BaseException, error.__cause__))
    health = batcher.health()
    assert (health.state, health.ok, health.replicas_alive, health.queued_tokens) == (
        "device lost",
        False,
        0,
        0,
    )
    assert all(gate.batches == [] for gate in gates)
    with pytest.raises(DeviceLostError):
        submit(batcher, [ids(1)])


def test_a_request_can_lose_two_devices_at_most(make: Make) -> None:
    def score(batch: list[IntArray]) -> list[float]:
        if 13.0 in firsts(batch):
            raise lost()
        return firsts(batch)

    batcher = make(score, score, score)
    assert isinstance(submit(batcher, [ids(13)]).exception(PATIENCE_S), DeviceLostError)
    assert batcher.health().replicas_alive == 1
    assert batcher.health().ok
    assert submit(batcher, [ids(5)]).result(PATIENCE_S) == [5.0]


def test_a_device_is_lost_while_a_batch_is_repeated_request_by_request(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    occupying = occupy(batcher, gates)
    shared = [submit(batcher, [ids(number)]) for number in (20, 21, 22)]
    gates[0].let_through(1)
    gates[0].wait_until_entered()  # with the three requests together
    gates[0].error = ValueError("one of them is to blame")
    gates[0].let_through(1)
    gates[0].wait_until_entered()  # with the first of these requests alone
    gates[0].error = lost()
    gates[0].let_through()
    gates[1].let_through()
    assert results(shared) == [[20.0], [21.0], [22.0]]
    assert sorted(results(occupying)) == [[0.0], [1.0]]
    assert all(value < 20 for batch in gates[0].batches for value in batch)


def test_cancelled_or_failed_requests_are_not_queued_again(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    future, other = occupy(batcher, gates)
    assert future.cancel()
    gates[0].error = lost()
    for gate in gates:
        gate.let_through()
    other.result(PATIENCE_S)
    batcher.close()
    assert sum(len(batch) for gate in gates for batch in gate.batches) == 1
    assert stats_of(batcher).cancelled == 1


# --- other ends --------------------------------------------------------------------------------------


def test_the_death_of_one_worker_fails_only_its_batch(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    first, second = occupy(batcher, gates)
    waiting = [submit(batcher, [ids(number)]) for number in range(30)]
    gates[0].error = SystemExit()
    gates[0].let_through()
    assert isinstance(first.exception(PATIENCE_S), WorkerDiedError)
    gates[1].let_through(2)
    assert len(second.result(PATIENCE_S)) == 1
    assert results(waiting) == [[float(number)] for number in range(30)]
    assert batcher.health().replicas_alive == 2
    # The next call starts a new worker.
    again = submit(batcher, [sized(number, 100) for number in range(2)])
    gates[0].wait_until_entered()
    for gate in gates:
        gate.let_through()
    assert again.result(PATIENCE_S) == [0.0, 1.0]


def test_no_request_waits_after_the_death_of_all_workers(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    futures = [*occupy(batcher, gates), *(submit(batcher, [ids(number)]) for number in range(30))]
    for gate in gates:
        gate.error = SystemExit()
        gate.let_through(1)
    assert {type(future.exception(PATIENCE_S)) for future in futures} == {WorkerDiedError}


def test_an_error_of_one_batch_ends_a_request_once(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    future = submit(batcher, [sized(number, 100) for number in range(10)])
    for gate in gates:
        gate.wait_until_entered()
    gates[0].error = ValueError("poison")
    gates[0].let_through()
    assert isinstance(future.exception(PATIENCE_S), ValueError)
    assert batcher.health().queued_tokens == 0
    gates[1].let_through()
    assert submit(batcher, [ids(5)]).result(PATIENCE_S) == [5.0]
    assert stats_of(batcher).failed == 1


def test_cancelling_drops_sequences_that_no_replica_has_started(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    future = submit(batcher, [sized(6, 100)] * 10)
    for gate in gates:
        gate.wait_until_entered()
    assert future.cancel()
    assert batcher.health().queued_tokens == 0
    for gate in gates:
        gate.let_through()
    assert submit(batcher, [ids(2)]).result(PATIENCE_S) == [2.0]
    batcher.close()
    assert sum(batch.count(6.0) for gate in gates for batch in gate.batches) == 2
    assert stats_of(batcher).cancelled == 1
    with pytest.raises(CancelledError):
        future.result(0)


def test_close_finishes_accepted_requests(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    futures = [submit(batcher, [sized(number, 40)]) for number in range(40)]
    for gate in gates:
        gate.wait_until_entered()
    for gate in gates:
        gate.let_through()
    batcher.close()
    assert results(futures) == [[float(number)] for number in range(40)]
    with pytest.raises(ScorerClosedError):
        submit(batcher, [ids(1)])


def test_close_finishes_the_batch_of_a_device_lost_meanwhile(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    first, second = occupy(batcher, gates)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gates[1].let_through()
    assert len(second.result(PATIENCE_S)) == 1  # its worker has no more work
    gates[0].error = lost()
    gates[0].let_through()
    closing.join(PATIENCE_S)
    assert len(first.result(0)) == 1


def test_close_with_a_timeout_fails_running_requests(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    futures = [*occupy(batcher, gates), submit(batcher, [ids(1)])]
    batcher.close(timeout=0.05)
    assert {type(future.exception(0)) for future in futures} == {ScorerClosedError}
    for gate in gates:
        gate.let_through()


def test_two_workers_that_close_the_queue_do_not_wait_for_each_other(make: Make, gates: list[Gate]) -> None:
    batcher = make(*gates)
    meeting = threading.Barrier(2)
    closed = threading.Semaphore(0)

    def close(_: object) -> None:
        meeting.wait(PATIENCE_S)
        batcher.close()
        closed.release()

    for future in occupy(batcher, gates):
        future.add_done_callback(close)
    for gate in gates:
        gate.let_through()
    assert closed.acquire(timeout=PATIENCE_S)
    assert closed.acquire(timeout=PATIENCE_S)


def test_two_thousand_requests_while_devices_are_lost_one_by_one(make: Make) -> None:
    """There are also errors and cancellations. Each request ends with its own result or error."""
    chooser = random.Random(0)
    lock = threading.Lock()
    num_batches = 0

    def score(batch: list[IntArray]) -> list[float]:
        nonlocal num_batches
        with lock:
            num_batches += 1
            is_last_of_device = num_batches in (300, 600)
            is_bad = chooser.random() < 0.02
        if is_last_of_device:
            raise lost()
        if is_bad:
            raise FloatingPointError("injected")
        return firsts(batch)

    batcher = make(score, score, score, score, budgets=(20,))
    futures = [submit(batcher, [sized(number, chooser.randrange(1, 9))] * 3) for number in range(2000)]
    doomed = {number for number in range(2000) if chooser.random() < 0.1 and futures[number].cancel()}
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
    assert num_errors < 200
    health, stats = batcher.health(), stats_of(batcher)
    assert (health.state, health.replicas_alive, health.queued_tokens) == ("ok", 2, 0)
    assert (stats.cancelled, stats.failed, stats.lost_replicas) == (len(doomed), num_errors, 2)


# --- with models -------------------------------------------------------------------------------------


class Watched:
    """A runner that counts its batches. Its first batch waits for the first batch of the other runner."""

    def __init__(self, runner: Runner, together: threading.Barrier) -> None:
        self.device = runner.device
        self.depth = runner.depth
        self.max_batch_tokens = runner.max_batch_tokens
        self.num_splits = 0
        self.num_batches = 0
        self._runner = runner
        self._together = together

    def launch(self, sequences: list[IntArray], *, is_alone: bool) -> Pending | None:
        if self.num_batches == 0:
            self._together.wait(PATIENCE_S)
        self.num_batches += 1
        return self._runner.launch(sequences, is_alone=is_alone)


def test_two_replicas_give_the_scores_of_one(checkpoint: Path, scorer: Scorer, texts: list[str]) -> None:
    config = ScorerConfig(model=str(checkpoint), device="cpu", dtype="float32", max_batch_tokens=512)
    shape = read_shape(checkpoint)
    together = threading.Barrier(2)
    watched = [Watched(load_runner(config, checkpoint, shape), together) for _ in range(2)]
    cache = TokenCache(100_000)
    tokenizer = PairTokenizer(checkpoint / "tokenizer.json", config, cache)
    pipeline = Pipeline(tokenizer, cache, cast(list[Runner], watched), config, is_device_lost)
    pairs = PreparedPairs([("what is a panda?", texts)])
    scores = pairs.scores(pipeline.run(pairs), normalize=False)
    assert scores == pytest.approx(
        scorer.score([("what is a panda?", text) for text in texts]), abs=TOLERANCE
    )
    assert all(runner.num_batches for runner in watched)
    assert pipeline.health().replicas_alive == 2
    pipeline.close()


def test_a_scorer_accepts_a_list_of_devices(checkpoint: Path, scorer: Scorer) -> None:
    with Scorer(checkpoint, devices=["cpu"]) as listed:
        assert listed.config.devices == ("cpu",)
        assert listed.score([("a", "b")]) == scorer.score([("a", "b")])
        assert repr(listed).endswith(", cpu)")
        assert (listed.health().replicas, listed.health().replicas_alive) == (1, 1)
    assert (listed.health().replicas, listed.health().replicas_alive) == (1, 0)


def test_each_device_is_looked_for_before_any_model_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    config = ScorerConfig(devices=("cuda:98", "cuda:99"))
    with pytest.raises(DeviceError, match="cuda:99"):
        load_runners(config, tmp_path, read_shape(checkpoint))
