"""Many callers, one queue, one device or several: whoever is waiting shares the next batch.

Pure policy over score callables; nothing here knows of texts or tensors.
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

# How long interpreter exit waits for the batches that are being computed.
_EXIT_S: Final = 4.0

_live: weakref.WeakSet[MicroBatcher] = weakref.WeakSet()
# Every worker that was started, so that exit waits for those too that no batcher lists any more.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(eq=False)
class Replica:
    """One device's copy of the model.

    Attributes:
        score: Sequences to logits, in order; called by one thread.
        max_batch_tokens: Gives the most tokens of its next batch; a longer sequence is a batch by itself.
    """

    score: Callable[[list[IntArray]], list[float]]
    max_batch_tokens: Callable[[], int]

    def release(self) -> None:
        """Let go of the model. The frames of a worker that met an error may still refer to this object."""
        self.score = _released
        self.max_batch_tokens = lambda: 1


def _released(batch: list[IntArray]) -> list[float]:  # noqa: ARG001
    raise ScorerClosedError("this scorer was closed; make a new one")


class MicroBatcher:
    """Feeds devices from any number of threads; each request ends in a result, an error or cancelled.

    Batches are filled across requests, by tokens, and each replica takes its next one from the same queue
    as soon as it is idle. Cancelling a request's future drops what of it has not started. An error of a
    batch that several requests share is retried once, each request alone, so that it reaches only who
    causes it. A replica whose device is lost is left out; what it was computing goes to another, once.

    Args:
        replicas: At least one; their scores are the same.
        max_wait_ms: How long a request may wait for company while its batch is not full.
        max_queued_tokens: Most tokens that may wait; None is no limit.
        is_device_lost: Whether an error means that the device will not work again.
        idle_s: How long a worker waits for more before it ends, and with the last one the last hold on a
            model that was forgotten; the next request starts others.

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
        # All that follows is read and written under the condition's lock.
        self._replicas = list(replicas)  # those whose devices work
        self._workers: dict[Replica, threading.Thread] = {}
        self._waiting = WaitingList()
        self._running: dict[Replica, Batch] = {}  # what of its current batch each still owes
        self._closed = False
        self._abandoned = False
        self._lost: BaseException | None = None
        self._recorder = Recorder()
        _live.add(self)

    def submit(
        self, sequences: Sequence[IntArray], on_progress: Callable[[int], object] | None = None
    ) -> Future[list[float]]:
        """Queue a request and return the future of its logits; for the errors see `add`.

        Args:
            sequences: int32 ids of each sequence, none empty.
            on_progress: As in `Request`.
        """
        request = Request(on_progress)
        self.add(request, sequences)
        return request.future

    def add(self, request: Request, sequences: Sequence[IntArray], *, is_last: bool = True) -> None:
        """Queue sequences of a request; of one that has ended, none.

        Args:
            request: A new one, or one to which this was done before.
            sequences: int32 ids of each sequence, none empty.
            is_last: Whether these are all there will be; until then the request does not end by itself.

        Raises:
            QueueFullError: They do not fit under `max_queued_tokens`.
            ScorerClosedError, DeviceLostError, ForkedProcessError: Nothing can be taken any more. The
                request's future does not get this error.
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
            # Not under the lock: on a future that is done already the callback is called at once. A future
            # keeps its callbacks, so this one must refer to neither the batcher nor the request.
            request.future.add_done_callback(
                partial(_forget_cancelled, weakref.ref(self), weakref.ref(request))
            )

    def check_open(self) -> None:
        """Raise what `submit` would raise for the smallest request."""
        check_process()
        with self._changed:
            self._check_open(1)

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, finish those accepted and let go of the replicas. May be called twice.

        Args:
            timeout: Seconds after which those that are not finished get `ScorerClosedError`.
        """
        if was_forked():
            return  # the workers and whoever waits for them are in the parent process
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
            # Whatever still refers to this object, such as an error's traceback, must not keep the model.
            while self._replicas:
                self._replicas.pop().release()

    def count(
        self, *, duplicates: int, truncations: int, query_truncations: int, blank_passages: int
    ) -> None:
        """Add to the counts that only the caller knows."""
        with self._changed:
            self._recorder.duplicates += duplicates
            self._recorder.truncations += truncations
            self._recorder.query_truncations += query_truncations
            self._recorder.blank_passages += blank_passages

    def stats(self, *, cache_hits: int, cache_misses: int, splits: int) -> ScorerStats:
        """Return what happened so far, with what the tokenizer's and the devices' side count."""
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
        """Return whether requests are taken, and if not, why."""
        check_process()
        with self._changed:
            state: HealthState = "closed" if self._closed else "ok"
            if self._lost is not None:
                state = "device lost"
            return ScorerHealth(
                state, len(self._waiting), self._waiting.num_tokens, self._num_replicas, len(self._replicas)
            )

    def _abandon(self) -> None:
        """Refuse new requests and forget those that wait; the workers end after their current batch."""
        with self._changed:
            self._closed = self._abandoned = True
            self._waiting.clear()
            self._changed.notify_all()

    def _check_open(self, num_tokens: int) -> None:
        if self._lost is not None:
            raise _device_lost(self._lost)
        if self._abandoned and threading.current_thread().daemon:
            return  # it waits, like those before it, for the end it is about to meet
        if self._closed:
            raise ScorerClosedError("this scorer was closed; make a new one")
        limit = self._max_queued_tokens
        if limit is not None and self._waiting.num_tokens + num_tokens > limit:
            raise QueueFullError(
                f"{self._waiting.num_tokens} tokens are waiting and this request has {num_tokens} or more; "
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
        # One that closes the queue itself waits for none, lest two of them wait for each other.
        return None if threading.current_thread() in workers else next(iter(workers), None)

    def _work(self, replica: Replica) -> None:
        """Run batches until there has been nothing to do for a while; a worker's whole life."""
        try:
            while batch := self._next_batch(replica):
                self._run(replica, batch)
        except BaseException as error:  # whatever ends this thread must not leave anybody waiting
            logger.error("a worker thread ended by %s", type(error).__name__)
        finally:
            with self._changed:
                orphans: list[Request] = []
                if self._workers.get(replica) is threading.current_thread():
                    del self._workers[replica]
                    orphans += self._running.pop(replica, {})
                    orphans += [] if self._workers else self._waiting  # else the others serve them
            for request in orphans:
                self._fail(request, WorkerDiedError("the worker thread ended while this request waited"))

    def _next_batch(self, replica: Replica) -> Batch:
        """Wait for work and take a batch of it; nothing means that the worker is to end."""
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
            # Decided under the lock, so that the next request starts another worker.
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
            if not is_exiting():  # else nobody waits for an answer; see `_end_all`
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
            # Not before: a worker that ended on the way here would have forgotten whom it owes an answer.
            for request in batch:
                del self._running[replica][request]

    def _report(self, request: Request, logits: dict[int, float]) -> None:
        """Tell a request's owner of progress, and of the result if that was the last of it."""
        try:
            if request.on_progress is not None:
                with request.progress_lock:
                    request.on_progress(len(logits))
        except Exception as error:  # a fault of the caller's own
            self._fail(request, error)
        with self._changed:  # other replicas may have others of its sequences, and its owner may add some
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
        """Go on without a replica, and let the others do what it has not done."""
        failed: list[Request] = []
        with self._changed:
            if replica in self._replicas:  # else `close` did not wait for this batch
                self._replicas.remove(replica)
                replica.release()
            self._recorder.lost_replicas += 1
            if not self._replicas:
                self._lost = error
                failed += self._waiting
            for request, indices in self._running.pop(replica).items():
                # A request that fails one device after the other is not to fail them all.
                if request.has_lost_device or not self._replicas:
                    failed.append(request)
                elif not (request.is_over or self._abandoned):
                    self._waiting.add(request, indices)
                request.has_lost_device = True
            if self._waiting:
                self._wake_workers()
        logger.error("a device is lost: %s; %d left", type(error).__name__, len(self._replicas))
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
        """Whether the caller, of all threads that may want to, is the one to end this request."""
        with self._changed:
            if request.is_claimed:
                return False
            request.is_claimed = True
        return request.future.set_running_or_notify_cancel()

    def _forget(self, request: Request) -> None:
        """Drop a request that its caller cancelled."""
        self._claim(request)  # wakes callers that wait for several futures at once
        with self._changed:
            self._recorder.cancelled += 1
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """Forget what of a request has not started."""
        self._waiting.drop(request)
        self._changed.notify_all()


def _device_lost(cause: BaseException) -> DeviceLostError:
    error = DeviceLostError(f"the device failed ({type(cause).__name__}) and needs a new process")
    error.__cause__ = cause
    return error


def _forget_cancelled(
    batcher_ref: weakref.ref[MicroBatcher], request_ref: weakref.ref[Request], future: Future[list[float]]
) -> None:
    batcher, request = batcher_ref(), request_ref()
    if future.cancelled() and batcher is not None and request is not None:
        batcher._forget(request)


def _end_all() -> None:
    """Let no worker run into the interpreter's end, where it would be ended by force.

    Only daemon threads can still be waiting for a result. They end with the interpreter, and an error that
    they got now would only be printed.
    """
    if was_forked():
        return  # the workers are in the parent process
    begin_exit()
    deadline = time.monotonic() + _EXIT_S
    for batcher in list(_live):
        batcher._abandon()
    for thread in list(_threads):
        thread.join(max(deadline - time.monotonic(), 0.0))


atexit.register(_end_all)
