"""`MicroBatcher`: accepts the requests of many callers, and gives each its result or its error.

It works on token ids and functions that score them. It knows neither texts nor tensors. `queue.py` decides
which sequences share a batch, and `workers.py` runs the batches. The counts of texts that `count` takes are
only added up here, so that `stats` is one snapshot.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from bge_rerank_integrations.batching.queue import RequestQueue
from bge_rerank_integrations.batching.request import Batch, Request, State
from bge_rerank_integrations.batching.stats import HealthState, Recorder, ScorerHealth, ScorerStats
from bge_rerank_integrations.batching.workers import Replica, Worker, join_all, sequences_of
from bge_rerank_integrations.errors import (
    DeviceLostError,
    QueueFullError,
    ScorerClosedError,
    WorkerDiedError,
)
from bge_rerank_integrations.runtime.fork_guard import check_process, mark_process_in_use, was_forked
from bge_rerank_integrations.runtime.locks import SafeCondition
from bge_rerank_integrations.runtime.shutdown import end_at_exit, is_exiting, join_until, wait_while
from bge_rerank_integrations.runtime.uninterrupted import run_uninterrupted
from bge_rerank_integrations.text.tokenization import IntArray

logger = logging.getLogger(__name__)


class MicroBatcher:
    """Queues the requests of any number of threads and runs them in shared batches.

    A worker thread for each replica launches the next batch while its device still computes the previous one.
    A batch contains sequences of several requests, up to a number of tokens. Each request ends with a result,
    with an exception, or cancelled.

    Cancelling the future of a request drops its sequences that wait. If a batch that several requests share
    fails, each of these requests is repeated once on its own. Only the request that causes the error then
    fails. If a batch does not fit into memory, its sequences go back into the queue, and the next batches are
    smaller. If a device is lost, its replica is no longer used, and its batches go back into the queue. A
    request that loses a second device fails.

    Args:
        replicas: At least one replica. All replicas give the same scores.
        max_wait_ms: Maximum time in milliseconds that a request waits for others to fill its batch.
        max_queued_tokens: Maximum number of waiting tokens. None means no limit.
        is_device_lost: Returns whether an exception means that the device will not work again.
        idle_s: Time in seconds after which an idle worker ends. A worker keeps the model in memory, so this
            frees a model that is no longer referenced. The next request starts new workers.

    Example:
        >>> replica = Replica(runner.launch, lambda: runner.max_batch_tokens)
        >>> request = Request()
        >>> MicroBatcher([replica]).add(request, [np.array([0, 2, 2, 2], dtype=np.int32)])
        >>> request.future.result()
        [7.7...]
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
        self._changed = SafeCondition()
        # The following attributes are read and written under the lock of the condition.
        self._replicas = list(replicas)  # replicas whose devices work
        self._workers: dict[Replica, Worker] = {}
        self._queue = RequestQueue()
        # Requests that `accept` has accepted, and the threads that add their sequences. The references are
        # weak, so that a caller that fails leaves nothing behind.
        self._accepted: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self._closed = False
        self._abandoned = False
        self._lost: BaseException | None = None
        self._recorder = Recorder()
        _live.add(self)

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
            self._check_open(request, sum(map(len, sequences)))
            if self._abandoned or request.is_over:
                return
            if is_last:
                request.state = State.WHOLE
            if sequences:
                mark_process_in_use()
                self._recorder.requests += is_first
                self._wake_workers()  # first, because it raises if the interpreter can start no more threads
                self._queue.add(request, request.grow(sequences))
        # The lock must not be held from here on, because a future that is done calls its callbacks at once.
        if not sequences:
            self._finish(request)
        if is_first:
            # A future keeps its callbacks, so the callback has only weak references to batcher and request.
            request.future.add_done_callback(
                partial(_forget_cancelled, weakref.ref(self), weakref.ref(request))
            )

    def accept(self, request: Request, *, num_tokens: int) -> None:
        """Accept a request to which this thread will add sequences. `close` waits for the last of them.

        Cancel the future of the request if its last sequences will not be added.

        Args:
            request: A new request, or a request that has been accepted and has more tokens now.
            num_tokens: Number of tokens that `add` will get at least.

        Raises:
            QueueFullError, ScorerClosedError, DeviceLostError, ForkedProcessError: For the same reasons as
                `add`.
        """
        check_process()
        with self._changed:
            self._check_open(request, num_tokens)
            if not self._abandoned:
                self._accepted[request] = threading.get_ident()

    def close(self, timeout: float | None = None) -> None:
        """Reject new requests, finish the accepted ones and release the replicas.

        It is safe to call this twice. A signal handler must call it in another thread, and must not wait for
        that thread. The call that the handler has interrupted may hold a lock that the workers need, or
        `close` may wait for its sequences.

        In a thread of `is_in_a_call`, this does not wait for callers that add sequences.

        Args:
            timeout: Maximum time in seconds to finish accepted requests. When it is over, the remaining
                requests fail with `ScorerClosedError`. None means no limit.
        """
        if was_forked():
            return  # the workers and their callers exist in the parent process only
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.is_in_a_call():
            wait_while(lambda: bool(self._growing()), deadline)
        # If a device is lost meanwhile, other workers start. A worker that calls this method itself must not
        # wait for other workers, because two of them would wait for each other.
        while (threads := self._live_threads()) and threading.current_thread() not in threads:
            if not join_until(threads, deadline):
                break
        with self._changed:
            self._accepted.clear()
        self._fail_all()
        with self._changed:
            # Objects that still refer to this batcher, such as a traceback, must not keep the model in
            # memory.
            while self._replicas:
                self._replicas.pop().release()
            self._changed.notify_all()

    def is_in_a_call(self) -> bool:
        """Return whether this thread is in the middle of a call, or is a worker. A finalizer may run there.

        Such a thread must not wait for others. Two of them would wait for each other, or one of them may hold
        a lock that the others need.
        """
        if was_forked():
            return False
        if self._changed._is_owned():  # type: ignore[attr-defined]
            return True
        is_worker = threading.current_thread() in self._live_threads()
        return is_worker or threading.get_ident() in self._growing()

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
                queued_requests=len(self._queue),
                queued_tokens=self._queue.num_tokens,
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
                state,
                len(self._queue),
                self._queue.num_tokens,
                self._num_replicas,
                len(self._replicas),
            )

    # --- for the workers; see `Work` ---------------------------------------------------------------------

    def next_batch(self, worker: Worker) -> Batch | None:
        """See `Work`."""
        replica = worker.replica
        with self._changed:
            while not self._abandoned and self._serves(worker):
                timeout_s = None  # until something changes
                if not (self._queue or worker.batches):
                    if self._closed or not (self._changed.wait(self._idle_s) or self._queue):
                        break
                    continue
                if self._queue and worker.has_room and self._is_worth_launching(worker):
                    timeout_s = self._patience_s(replica)
                    if timeout_s <= 0:
                        return self._take(worker)
                self._changed.wait(timeout_s)
            # This happens under the lock, so that the next request starts a new worker.
            if self._workers.get(replica) is worker:
                del self._workers[replica]
            return None

    def complete(self, worker: Worker, batch: Batch, logits: list[float], compute_s: float) -> None:
        """See `Work`."""
        with self._changed:
            if not _remove(worker.running, batch):
                return  # the worker has died, or its device was lost, and the sequences are queued again
            # The loss of the device does not affect this batch any more. The death of the worker does.
            worker.answering.append(batch)
            self._changed.notify_all()  # the device may be idle now
            self._recorder.computed(
                num_requests=len(batch),
                num_pairs=len(logits),
                num_tokens=sum(map(len, sequences_of(batch))),
                budget=worker.replica.max_batch_tokens(),
                compute_s=compute_s,
            )
            for request in batch:
                request.runs_alone = False
        values = iter(logits)
        for request, indices in batch.items():
            self._report(request, {index: next(values) for index in indices})
        self._end_answers(worker, batch)

    def put_back(self, worker: Worker, batch: Batch) -> None:
        """See `Work`."""
        with self._changed:
            worker.needs_memory = len(worker.running) > 1
            if _remove(worker.running, batch):
                self._queue_again(batch)

    def recover(self, worker: Worker, batch: Batch, error: Exception) -> None:
        """See `Work`."""
        if is_exiting():
            return  # no caller waits for a result
        if self._is_device_lost is not None and self._is_device_lost(error):
            self._lose(worker, error)
            return
        with self._changed:
            if not _remove(worker.running, batch):
                return
            if len(batch) > 1:
                for request in batch:
                    request.runs_alone = True
                self._queue_again(batch)
                return
            worker.answering.append(batch)
        for request in batch:
            self._fail(request, error)
        self._end_answers(worker, batch)

    def remove(self, worker: Worker) -> None:
        """See `Work`."""
        with self._changed:
            if self._workers.get(worker.replica) is worker:
                del self._workers[worker.replica]
            orphans = [request for batch in worker.batches for request in batch]
            worker.running.clear()
            worker.answering.clear()
            if not self._workers:  # other workers serve waiting requests
                orphans += self._queue
            self._changed.notify_all()
        if not is_exiting():  # at exit no caller waits for a result; see `_end_all`
            for request in orphans:
                self._fail(request, WorkerDiedError("a worker thread died while this request waited"))

    def _lose(self, worker: Worker, error: Exception) -> None:
        """Stop using a device, and queue its batches again."""
        with self._changed:
            if worker.replica in self._replicas:
                self._replicas.remove(worker.replica)
                worker.replica.release()
                self._recorder.lost_replicas += 1
            elif not worker.running:
                return  # an earlier batch has reported the loss
            affected = dict.fromkeys(request for batch in worker.running for request in batch)
            # A request that has lost two devices may be the cause. It must not lose all of them.
            failed = [request for request in affected if request.num_lost_devices or not self._replicas]
            if not self._replicas:
                self._lost = error
                failed += self._queue
            for request in affected:
                request.num_lost_devices += 1
            for batch in worker.running:
                self._queue_again({r: indices for r, indices in batch.items() if r not in failed})
            worker.running.clear()
            if self._queue:
                self._wake_workers()
            num_left = len(self._replicas)
            self._changed.notify_all()
        for request in failed:
            self._fail(request, _device_lost(error))
        with suppress(Exception):  # a logging filter of the application may raise
            logger.error("a device was lost (%s); %d device(s) left", type(error).__name__, num_left)

    # --- under the lock ----------------------------------------------------------------------------------

    def _serves(self, worker: Worker) -> bool:
        """Return whether a worker has not died and its replica is in use."""
        return worker.replica in self._replicas and self._workers.get(worker.replica) is worker

    def _is_worth_launching(self, worker: Worker) -> bool:
        """Return whether to launch a batch now. A device that is idle always gets one."""
        if not worker.running:
            return True
        if self._num_others_idle(worker.replica):
            return False  # they take what waits
        return self._queue.is_worth_launching_ahead(worker.replica.max_batch_tokens())

    def _patience_s(self, replica: Replica) -> float:
        """Return how many seconds the waiting sequences still wait for others that fill their batch."""
        if self._closed or self._queue.num_tokens >= replica.max_batch_tokens():
            return 0.0
        waited_s = time.monotonic() - self._queue.oldest.submitted_at
        # It is negative if the thread of the caller has another clock, as with the test library freezegun.
        return self._max_wait_s - waited_s if waited_s >= 0 else 0.0

    def _num_others_idle(self, replica: Replica) -> int:
        busy = [worker.replica for worker in self._workers.values() if worker.batches]
        return sum(other not in busy for other in self._replicas if other is not replica)

    def _take(self, worker: Worker) -> Batch:
        # Idle devices share the waiting tokens. If all devices are busy, all of them share.
        num_idle = self._num_others_idle(worker.replica) + 1
        num_sharing = len(self._replicas) if worker.running else num_idle
        max_tokens = min(worker.replica.max_batch_tokens(), self._queue.even_share(num_sharing))
        batch = self._queue.take(max_tokens)
        worker.running.append(batch)
        worker.needs_memory = False
        now = time.monotonic()
        for request in batch:
            if request.started_at is None:
                request.started_at = now
                self._recorder.started(now - request.submitted_at)
        if self._queue:  # others that left the waiting sequences to this worker may take the rest
            self._changed.notify_all()
        return batch

    def _queue_again(self, batch: Batch) -> None:
        if not self._abandoned:
            for request, indices in batch.items():
                self._queue.put_back(request, indices)
            self._changed.notify_all()

    def _wake_workers(self) -> None:
        for replica in self._replicas:
            if replica not in self._workers:
                worker = Worker(self, replica)
                worker.start()  # its threads wait for the lock
                self._workers[replica] = worker
        self._changed.notify_all()

    def _growing(self) -> set[int | None]:
        """Return the threads that will add sequences to requests that have been accepted."""
        with self._changed:
            return {
                self._accepted.get(request)
                for reference in self._accepted.keyrefs()  # a copy: a finalizer may change the dictionary
                if (request := reference()) is not None
                and request.state is State.GROWING
                and not request.is_over
            }

    def _live_threads(self) -> list[threading.Thread]:
        with self._changed:
            return [thread for worker in self._workers.values() for thread in worker.threads]

    def _abandon(self) -> None:
        """Reject new requests and drop the waiting ones. The workers end after their current batch."""
        with self._changed:
            self._closed = self._abandoned = True
            self._accepted.clear()
            self._queue.clear()
            self._changed.notify_all()

    def _check_open(self, request: Request, num_tokens: int) -> None:
        if self._lost is not None:
            raise _device_lost(self._lost)
        if self._abandoned and threading.current_thread().daemon:
            return  # `add` ignores its sequences, and it waits until it ends with the interpreter
        if self._closed and request not in self._accepted:
            raise ScorerClosedError
        limit = self._max_queued_tokens
        if limit is not None and self._queue.num_tokens + num_tokens > limit:
            raise QueueFullError(
                f"{self._queue.num_tokens} tokens are waiting and this request has at least {num_tokens}; "
                f"max_queued_tokens is {limit}",
                never_fits=num_tokens > limit,
            )

    def _end_answers(self, worker: Worker, batch: Batch) -> None:
        with self._changed:
            _remove(worker.answering, batch)
            self._changed.notify_all()

    # --- how requests end --------------------------------------------------------------------------------

    def _report(self, request: Request, logits: dict[int, float]) -> None:
        """Report progress to the caller of a request, and set the result if all its logits are known."""
        try:
            if request.on_progress is not None:
                with request.progress_lock:
                    request.on_progress(len(logits))
        except Exception as error:  # raised by the caller's callback
            self._fail(request, error)
        with self._changed:  # other workers may set logits of this request, and its caller may add sequences
            request.record(logits)
        self._finish(request)

    def _finish(self, request: Request) -> None:
        """Set the result of a request if all its logits are known."""
        with self._changed:
            is_finished = request.has_all_logits and self._end(request)
        if is_finished:
            request.future.set_result(request.logits)

    def _fail(self, request: Request, error: BaseException) -> None:
        with self._changed:
            is_first = self._end(request)
            self._queue.drop(request)
            self._changed.notify_all()
            self._recorder.failed += is_first
        if is_first:
            request.future.set_exception(error)

    def _fail_all(self) -> None:
        with self._changed:
            running = [r for worker in self._workers.values() for batch in worker.batches for r in batch]
            requests = dict.fromkeys([*running, *self._queue])
        if requests:
            run_uninterrupted(partial(self._fail_unfinished, requests))

    def _fail_unfinished(self, requests: Iterable[Request]) -> None:
        for request in requests:
            # Callers must not share an exception. Its traceback would refer to the frames of all of them.
            self._fail(request, ScorerClosedError("the scorer was closed before this request was finished"))

    def _end(self, request: Request) -> bool:
        """End a request. Return whether this call must set the result or the exception of its future."""
        return request.end() and request.future.set_running_or_notify_cancel()

    def _forget(self, request: Request) -> None:
        """Remove a request that its caller has cancelled."""
        with self._changed:
            self._end(request)  # notifies callers of `concurrent.futures.wait`
            self._queue.drop(request)
            self._changed.notify_all()
            self._recorder.cancelled += 1


def _remove(batches: list[Batch], batch: Batch) -> bool:
    """Remove a batch from a list. Return False if it is not in the list."""
    if batch in batches:
        batches.remove(batch)
        return True
    return False


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


_live: weakref.WeakSet[MicroBatcher] = weakref.WeakSet()


def _end_all(deadline: float) -> None:
    """Stop all workers at interpreter exit. A worker that still runs after it would abort the process.

    Only daemon threads can still wait for a result. They end with the interpreter. They get no exception,
    because it would only be printed.
    """
    for batcher in list(_live):
        batcher._abandon()
    join_all(deadline)


end_at_exit(_end_all)
