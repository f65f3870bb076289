"""`MicroBatcher`: runs the requests of many callers in shared batches, on one device or several.

It works on token ids and functions that score them. It knows neither texts nor tensors.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final

from bge_rerank_integrations.batching.queue import WaitingList
from bge_rerank_integrations.batching.request import Batch, Request
from bge_rerank_integrations.batching.stats import HealthState, Recorder, ScorerHealth, ScorerStats
from bge_rerank_integrations.errors import (
    DeviceLostError,
    QueueFullError,
    ScorerClosedError,
    WorkerDiedError,
)
from bge_rerank_integrations.runtime.fork_guard import check_process, mark_process_in_use, was_forked
from bge_rerank_integrations.runtime.shutdown import begin_exit, is_exiting
from bge_rerank_integrations.runtime.tracebacks import release_frames
from bge_rerank_integrations.text.tokenization import IntArray

logger = logging.getLogger(__name__)

# Maximum time in seconds that interpreter exit waits for running batches.
_EXIT_S: Final = 4.0

_live: weakref.WeakSet[MicroBatcher] = weakref.WeakSet()
# All workers that were started. Exit also waits for workers that their batcher no longer lists.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(eq=False)
class Replica:
    """The copy of the model on one device.

    Attributes:
        score: Returns the logit of each sequence, in order. Only one thread calls it.
        max_batch_tokens: Returns the maximum number of tokens in the next batch. A longer sequence is a batch
            of its own.
    """

    score: Callable[[list[IntArray]], list[float]]
    max_batch_tokens: Callable[[], int]

    def release(self) -> None:
        """Drop the references to the model. The traceback of an exception may keep this object alive."""
        self.score = _released
        self.max_batch_tokens = lambda: 1


def _released(batch: list[IntArray]) -> list[float]:  # noqa: ARG001
    raise ScorerClosedError("this scorer is closed; create a new one")


class MicroBatcher:
    """Queues the requests of any number of threads and runs them in shared batches.

    A worker thread for each replica takes the next batch from the queue as soon as its device is idle. A
    batch contains sequences of several requests, up to a number of tokens. Each request ends with a result,
    with an exception, or cancelled.

    Cancelling the future of a request drops its sequences that wait. If a batch fails that several requests
    share, each of these requests is repeated alone once, so that only the request that causes the error
    fails. If a device is lost, its replica is no longer used, and its batch goes back into the queue. A
    request that loses a second device fails.

    Args:
        replicas: At least one replica. All replicas give the same scores.
        max_wait_ms: Maximum time in milliseconds that a request waits for others to fill its batch.
        max_queued_tokens: Maximum number of waiting tokens. None is no limit.
        is_device_lost: Returns whether an exception means that the device will not work again.
        idle_s: Time in seconds after which an idle worker ends. A worker keeps the model in memory, so this
            frees a model that is no longer referenced. The next request starts new workers.

    Example:
        >>> lengths = Replica(lambda batch: [float(len(ids)) for ids in batch], lambda: 512)
        >>> MicroBatcher([lengths]).submit([np.array([0, 2, 2, 2], dtype=np.int32)]).result()
        [4.0]
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        max_wait_ms: float = 0.0,
        max_queued_tokens: int | None = None,
        is_device_lost: Callable[[BaseException], bool] | None = None,
        idle_s: float = 5.0,
    ) -> None:
        self._num_replicas = len(replicas)
        self._max_wait_s = max_wait_ms / 1000
        self._max_queued_tokens = max_queued_tokens
        self._is_device_lost = is_device_lost
        self._idle_s = idle_s
        self._changed = threading.Condition()
        # The following attributes are read and written under the lock of the condition.
        self._replicas = list(replicas)  # replicas whose devices work
        self._workers: dict[Replica, threading.Thread] = {}
        self._waiting = WaitingList()
        self._running: dict[Replica, Batch] = {}  # unanswered requests of the current batch
        self._closed = False
        self._abandoned = False
        self._lost: BaseException | None = None
        self._recorder = Recorder()
        _live.add(self)

    def submit(
        self, sequences: Sequence[IntArray], on_progress: Callable[[int], object] | None = None
    ) -> Future[list[float]]:
        """Queue a request.

        Args:
            sequences: int32 token ids [length] of each sequence. No sequence is empty.
            on_progress: As in `Request`.

        Returns:
            A future that gives the logit of each sequence, in order.

        Raises:
            RerankError: For the same reasons as `add`.
        """
        request = Request(on_progress)
        self.add(request, sequences)
        return request.future

    def add(self, request: Request, sequences: Sequence[IntArray], *, is_last: bool = True) -> None:
        """Add sequences to a request and queue them. This does nothing if the request has ended.

        Args:
            request: A new request, or a request of an earlier call.
            sequences: int32 token ids [length] of each sequence. No sequence is empty.
            is_last: Whether these are the last sequences. A request without its last sequences does not
                finish.

        Raises:
            QueueFullError: The sequences do not fit into the queue under `max_queued_tokens`.
            ScorerClosedError, DeviceLostError, ForkedProcessError: The batcher accepts no more sequences.
                This does not set an exception on the future of the request.
        """
        check_process()
        is_first = bool(sequences) and not request.sequences
        with self._changed:
            self._check_open(sum(map(len, sequences)))
            if self._abandoned or request.is_over:
                return
            request.is_whole = is_last
            if sequences:
                mark_process_in_use()
                self._recorder.requests += is_first
                self._waiting.add(request, request.grow(sequences))
                self._wake_workers()
            elif request.is_finished and self._claim(request):
                request.future.set_result(request.logits)
        if is_first:
            # The lock must not be held here, because a future that is already done calls the callback at
            # once. A future keeps its callbacks, so the callback has only weak references to batcher and
            # request.
            request.future.add_done_callback(
                partial(_forget_cancelled, weakref.ref(self), weakref.ref(request))
            )

    def check_open(self) -> None:
        """Raise the exception that `submit` would raise for the smallest request, if any."""
        check_process()
        with self._changed:
            self._check_open(1)

    def close(self, timeout: float | None = None) -> None:
        """Reject new requests, finish the accepted ones and release the replicas.

        It is safe to call this twice.

        Args:
            timeout: Maximum time in seconds to finish accepted requests. When it is over, the remaining
                requests fail with `ScorerClosedError`. None is no limit.
        """
        if was_forked():
            return  # the workers and their callers exist in the parent process only
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = None if timeout is None else time.monotonic() + timeout
        while worker := self._worker_to_join():
            worker.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            if worker.is_alive():
                break
        self._fail_all(ScorerClosedError("the scorer was closed before this request was finished"))
        with self._changed:
            # Objects that still refer to this batcher, such as a traceback, must not keep the model in
            # memory.
            while self._replicas:
                self._replicas.pop().release()

    def count(
        self, *, duplicates: int, truncations: int, query_truncations: int, blank_passages: int
    ) -> None:
        """Add to the counts of events that the batcher cannot see."""
        with self._changed:
            self._recorder.duplicates += duplicates
            self._recorder.truncations += truncations
            self._recorder.query_truncations += query_truncations
            self._recorder.blank_passages += blank_passages

    def stats(self, *, cache_hits: int, cache_misses: int, splits: int) -> ScorerStats:
        """Return statistics, including the given counts of the tokenizer and the devices."""
        check_process()
        with self._changed:
            return self._recorder.stats(
                queued_requests=len(self._waiting),
                queued_tokens=self._waiting.num_tokens,
                cache_hits=cache_hits,
                cache_misses=cache_misses,
                splits=splits,
            )

    def health(self) -> ScorerHealth:
        """Return whether the batcher accepts requests, and if it does not, why."""
        check_process()
        with self._changed:
            state: HealthState = "closed" if self._closed else "ok"
            if self._lost is not None:
                state = "device lost"
            return ScorerHealth(
                state, len(self._waiting), self._waiting.num_tokens, self._num_replicas, len(self._replicas)
            )

    def _abandon(self) -> None:
        """Reject new requests and drop the waiting ones. The workers end after their current batch."""
        with self._changed:
            self._closed = self._abandoned = True
            self._waiting.clear()
            self._changed.notify_all()

    def _check_open(self, num_tokens: int) -> None:
        if self._lost is not None:
            raise _device_lost(self._lost)
        if self._abandoned and threading.current_thread().daemon:
            return  # this thread ends with the interpreter; let it wait until then
        if self._closed:
            raise ScorerClosedError("this scorer is closed; create a new one")
        limit = self._max_queued_tokens
        if limit is not None and self._waiting.num_tokens + num_tokens > limit:
            raise QueueFullError(
                f"{self._waiting.num_tokens} tokens are waiting and this request has at least {num_tokens}; "
                f"max_queued_tokens is {limit}"
            )

    def _wake_workers(self) -> None:
        for replica in self._replicas:
            worker = self._workers.get(replica)
            if worker is None or not worker.is_alive():
                worker = threading.Thread(
                    target=self._work, args=(replica,), name="bge-rerank-worker", daemon=True
                )
                worker.start()
                self._workers[replica] = worker
                _threads.add(worker)
        self._changed.notify_all()

    def _worker_to_join(self) -> threading.Thread | None:
        with self._changed:
            workers = [worker for worker in self._workers.values() if worker.is_alive()]
        # A worker that calls `close` itself must not wait for workers. Two of them would wait for each other.
        return None if threading.current_thread() in workers else next(iter(workers), None)

    def _work(self, replica: Replica) -> None:
        """Run batches until the queue has been empty for `idle_s`. This is the main function of a worker."""
        try:
            while batch := self._next_batch(replica):
                self._run(replica, batch)
        except BaseException as error:  # no caller may wait for a thread that has ended
            logger.error("a worker thread died of %s", type(error).__name__)
        finally:
            with self._changed:
                orphans: list[Request] = []
                if self._workers.get(replica) is threading.current_thread():
                    del self._workers[replica]
                    orphans += self._running.pop(replica, {})
                    orphans += [] if self._workers else self._waiting  # other workers serve waiting requests
            for request in orphans:
                self._fail(request, WorkerDiedError("a worker thread died while this request waited"))

    def _next_batch(self, replica: Replica) -> Batch:
        """Wait for requests and take a batch. An empty batch means that the worker must end."""
        with self._changed:
            self._running.pop(replica, None)
            while replica in self._replicas:
                if self._waiting:
                    budget = replica.max_batch_tokens()
                    patience_s = self._waiting.oldest.submitted_at + self._max_wait_s - time.monotonic()
                    if patience_s <= 0 or self._closed:
                        num_idle = len(self._replicas) - len(self._running)
                        return self._take(replica, min(budget, self._waiting.even_share(num_idle)))
                    if self._waiting.num_tokens >= budget:
                        return self._take(replica, budget)
                    self._changed.wait(patience_s)
                elif self._closed or not (self._changed.wait(self._idle_s) or self._waiting):
                    break
            # This happens under the lock, so that the next request starts a new worker.
            del self._workers[replica]
            return {}

    def _take(self, replica: Replica, max_tokens: int) -> Batch:
        batch = self._waiting.take(max_tokens)
        self._running[replica] = dict(batch)
        now = time.monotonic()
        for request in batch:
            if not request.has_started:
                request.has_started = True
                self._recorder.started(now - request.submitted_at)
        return batch

    def _run(self, replica: Replica, batch: Batch) -> None:
        sequences = [request.sequences[index] for request, indices in batch.items() for index in indices]
        started = time.monotonic()
        try:
            logits = replica.score(sequences)
            if len(logits) != len(sequences):
                raise RuntimeError(f"{len(sequences)} sequences gave {len(logits)} scores")
        except Exception as error:
            release_frames(error)
            if not is_exiting():  # at exit no caller waits for a result; see `_end_all`
                self._recover(replica, batch, error)
            return
        with self._changed:
            self._recorder.computed(
                num_requests=len(batch),
                num_pairs=len(sequences),
                num_tokens=sum(map(len, sequences)),
                budget=replica.max_batch_tokens(),
                compute_s=time.monotonic() - started,
            )
        values = iter(logits)
        for request, indices in batch.items():
            self._report(request, {index: next(values) for index in indices})
        with self._changed:
            # Remove the requests only now. If the worker dies before this, `_work` fails the listed requests.
            for request in batch:
                del self._running[replica][request]

    def _report(self, request: Request, logits: dict[int, float]) -> None:
        """Report progress to the caller of a request, and set the result if all its logits are known."""
        try:
            if request.on_progress is not None:
                with request.progress_lock:
                    request.on_progress(len(logits))
        except Exception as error:  # raised by the caller's callback
            self._fail(request, error)
        with self._changed:  # other workers may set logits of this request, and its caller may add sequences
            for index, logit in logits.items():
                request.logits[index] = logit
            request.num_unfinished -= len(logits)
            is_finished = request.is_finished
        if is_finished and self._claim(request):
            request.future.set_result(request.logits)

    def _recover(self, replica: Replica, batch: Batch, error: Exception) -> None:
        if self._is_device_lost is not None and self._is_device_lost(error):
            self._lose(replica, error)
        elif len(batch) == 1:
            for request in batch:
                self._fail(request, error)
        else:
            for request, indices in batch.items():
                if replica in self._replicas and not request.future.done():
                    self._run(replica, {request: indices})

    def _lose(self, replica: Replica, error: Exception) -> None:
        """Stop using a replica, and put its unfinished sequences back into the queue."""
        failed: list[Request] = []
        with self._changed:
            if replica in self._replicas:  # it was removed if `close` did not wait for this batch
                self._replicas.remove(replica)
                replica.release()
            self._recorder.lost_replicas += 1
            if not self._replicas:
                self._lost = error
                failed += self._waiting
            for request, indices in self._running.pop(replica).items():
                # A request that has lost two devices may be the cause. It must not lose all of them.
                if request.has_lost_device or not self._replicas:
                    failed.append(request)
                elif not (request.is_over or self._abandoned):
                    self._waiting.add(request, indices)
                request.has_lost_device = True
            if self._waiting:
                self._wake_workers()
        logger.error("a device was lost (%s); %d device(s) left", type(error).__name__, len(self._replicas))
        for request in failed:
            self._fail(request, _device_lost(error))

    def _fail(self, request: Request, error: BaseException) -> None:
        is_first = self._claim(request)
        with self._changed:
            self._drop(request)
            self._recorder.failed += is_first
        if is_first:
            request.future.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            running = [request for batch in self._running.values() for request in batch]
            requests = dict.fromkeys([*running, *self._waiting])
        for request in requests:
            self._fail(request, error)

    def _claim(self, request: Request) -> bool:
        """Claim a request. Return whether this call is the one that may end the request."""
        with self._changed:
            if request.is_claimed:
                return False
            request.is_claimed = True
        return request.future.set_running_or_notify_cancel()

    def _forget(self, request: Request) -> None:
        """Remove a request that its caller has cancelled."""
        self._claim(request)  # notifies callers of `concurrent.futures.wait`
        with self._changed:
            self._recorder.cancelled += 1
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """Remove the waiting sequences of a request."""
        self._waiting.drop(request)
        self._changed.notify_all()


def _device_lost(cause: BaseException) -> DeviceLostError:
    error = DeviceLostError(f"the device failed ({type(cause).__name__}); start a new process to use it")
    error.__cause__ = cause
    return error


def _forget_cancelled(
    batcher_ref: weakref.ref[MicroBatcher], request_ref: weakref.ref[Request], future: Future[list[float]]
) -> None:
    batcher, request = batcher_ref(), request_ref()
    if future.cancelled() and batcher is not None and request is not None:
        batcher._forget(request)


def _end_all() -> None:
    """Stop all workers at interpreter exit. A worker that still runs after it would abort the process.

    Only daemon threads can still wait for a result. They end with the interpreter. They get no exception,
    because it would only be printed.
    """
    if was_forked():
        return  # the workers exist in the parent process only
    begin_exit()
    deadline = time.monotonic() + _EXIT_S
    for batcher in list(_live):
        batcher._abandon()
    for thread in list(_threads):
        thread.join(max(deadline - time.monotonic(), 0.0))


atexit.register(_end_all)
