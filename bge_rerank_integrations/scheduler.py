"""Many callers, one device: requests become futures, and whoever is waiting shares the next batch.

Pure policy over a score callable; nothing here knows of texts or tensors.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

from bge_rerank_integrations.errors import (
    DeviceLostError,
    QueueFullError,
    ScorerClosedError,
    WorkerDiedError,
)
from bge_rerank_integrations.process import check_process, mark_process_in_use, was_forked
from bge_rerank_integrations.stats import HealthState, Recorder, ScorerHealth, ScorerStats
from bge_rerank_integrations.tokenization import IntArray

logger = logging.getLogger(__name__)

# A share of each batch goes to whoever waits longest, the rest to whoever needs least: short requests pass
# long ones, and long ones are never at a standstill.
_OLDEST_SHARE: Final = 0.25
# How long interpreter exit waits for the batch that is being computed.
_EXIT_S: Final = 4.0

_live: weakref.WeakSet[MicroBatcher] = weakref.WeakSet()

_Batch = dict["_Request", list[int]]
"""Which of each request's sequences are in a batch."""


class MicroBatcher:
    """Feeds one device from any number of threads; each request ends in a result, an error or cancelled.

    Batches are filled across requests, by tokens. Cancelling a request's future drops what of it has not
    started. An error of a batch that several requests share is retried once, each request alone, so that
    it reaches only who causes it.

    Args:
        score: Sequences to logits, in order; called by one thread.
        max_batch_tokens: Gives the most tokens of the next batch; a longer sequence is a batch by itself.
        max_wait_ms: How long a request may wait for company while its batch is not full.
        max_queued_tokens: Most tokens that may wait; None is no limit.
        is_device_lost: Whether an error means that the device will not work again.
        idle_s: How long the worker waits for more before it ends, and with it the last hold on a model
            that was forgotten; the next request starts another.

    Example:
        >>> batcher = MicroBatcher(lambda batch: [float(len(ids)) for ids in batch], lambda: 512)
        >>> batcher.submit([np.array([0, 2, 2, 2], dtype=np.int32)]).result()
        [4.0]
    """

    def __init__(
        self,
        score: Callable[[list[IntArray]], list[float]],
        max_batch_tokens: Callable[[], int],
        *,
        max_wait_ms: float = 0.0,
        max_queued_tokens: int | None = None,
        is_device_lost: Callable[[BaseException], bool] | None = None,
        idle_s: float = 5.0,
    ) -> None:
        self._score = score
        self._max_batch_tokens = max_batch_tokens
        self._max_wait_s = max_wait_ms / 1000
        self._max_queued_tokens = max_queued_tokens
        self._is_device_lost = is_device_lost
        self._idle_s = idle_s
        self._changed = threading.Condition()
        # All that follows is read and written under the condition's lock.
        self._waiting: list[_Request] = []  # oldest first: those with sequences that have not started
        self._running: list[_Request] = []  # those with sequences in the current batch
        self._queued_tokens = 0
        self._worker: threading.Thread | None = None
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
            sequences: int32 ids of each sequence, none empty.
            on_progress: Called by the worker with the number of sequences that a batch finished.

        Returns:
            A future of the logits, in order; cancelling it drops what has not started.

        Raises:
            QueueFullError: The request does not fit under `max_queued_tokens`.
            ScorerClosedError, DeviceLostError, ForkedProcessError: No request can be taken any more.
        """
        request = _Request(sequences, on_progress)
        check_process()
        with self._changed:
            self._check_open(request.queued_tokens)
            if not sequences:
                request.future.set_result([])
                return request.future
            if self._abandoned:
                return request.future
            mark_process_in_use()
            self._waiting.append(request)
            self._queued_tokens += request.queued_tokens
            self._recorder.requests += 1
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="bge-rerank-worker", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        # Not under the lock: on a future that is done already the callback is called at once.
        request.future.add_done_callback(lambda future: self._drop(request) if future.cancelled() else None)
        return request.future

    def check_open(self) -> None:
        """Raise what `submit` would raise for the smallest request."""
        check_process()
        with self._changed:
            self._check_open(1)

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests and finish those accepted. May be called twice.

        Args:
            timeout: Seconds after which those that are not finished get `ScorerClosedError`.
        """
        if was_forked():
            return  # the worker and whoever waits for it are in the parent process
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
        if worker is not None and worker is not threading.current_thread():
            worker.join(timeout)
        self._fail_all(ScorerClosedError("the scorer was closed before this request was finished"))

    def count(self, *, duplicates: int, truncations: int) -> None:
        """Add to the counts that only the caller knows."""
        with self._changed:
            self._recorder.duplicates += duplicates
            self._recorder.truncations += truncations

    def stats(self, *, cache_hits: int, splits: int) -> ScorerStats:
        """Return what happened so far, with what the tokenizer's and the device's side count."""
        check_process()
        with self._changed:
            return self._recorder.stats(
                queued_requests=len(self._waiting),
                queued_tokens=self._queued_tokens,
                cache_hits=cache_hits,
                splits=splits,
            )

    def health(self) -> ScorerHealth:
        """Return whether requests are taken, and if not, why."""
        check_process()
        with self._changed:
            state: HealthState = "closed" if self._closed else "ok"
            if self._lost is not None:
                state = "device lost"
            return ScorerHealth(state, len(self._waiting), self._queued_tokens)

    def _abandon(self) -> threading.Thread | None:
        """Refuse new requests, forget those that wait, and return the worker, which ends with its batch."""
        if was_forked():
            return None
        with self._changed:
            self._closed = self._abandoned = True
            self._waiting.clear()
            self._queued_tokens = 0
            self._changed.notify_all()
            return self._worker

    def _check_open(self, num_tokens: int) -> None:
        if self._lost is not None:
            raise _device_lost(self._lost)
        if self._abandoned and threading.current_thread().daemon:
            return  # it waits, like those before it, for the end it is about to meet
        if self._closed:
            raise ScorerClosedError("this scorer was closed; make a new one")
        limit = self._max_queued_tokens
        if limit is not None and self._queued_tokens + num_tokens > limit:
            raise QueueFullError(
                f"{self._queued_tokens} tokens are waiting and this request has {num_tokens} or more; "
                f"max_queued_tokens is {limit}"
            )

    def _work(self) -> None:
        """Run batches until there has been nothing to do for a while; the worker's whole life."""
        try:
            while batch := self._next_batch():
                self._run(batch)
        except BaseException as error:  # whatever ends this thread must not leave anybody waiting
            logger.error("the worker thread ended by %s", type(error).__name__)
        finally:
            with self._changed:
                died = self._worker is threading.current_thread()
                if died:
                    self._worker = None
            if died:
                self._fail_all(WorkerDiedError("the worker thread ended while this request waited"))

    def _next_batch(self) -> _Batch:
        """Wait for work and take a batch of it; nothing means that the worker is to end."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed or not (self._changed.wait(self._idle_s) or self._waiting):
                        # Decided under the lock, so that the next request starts another worker.
                        self._worker = None
                        return {}
                    continue
                budget = self._max_batch_tokens()
                patience_s = self._waiting[0].submitted_at + self._max_wait_s - time.monotonic()
                if self._queued_tokens >= budget or patience_s <= 0 or self._closed:
                    return self._take(budget)
                self._changed.wait(patience_s)

    def _take(self, budget: int) -> _Batch:
        """Move sequences from those who wait into a batch."""
        batch: _Batch = {}
        now = time.monotonic()
        oldest = self._waiting[0]
        quotas = [(oldest, int(budget * _OLDEST_SHARE))]
        quotas += [(request, budget) for request in sorted(self._waiting, key=lambda r: r.queued_tokens)]
        left = budget
        for request, quota in quotas:
            before = request.queued_tokens
            indices = request.take(min(left, quota), at_least_one=not batch)
            if indices:
                batch.setdefault(request, []).extend(indices)
                left -= before - request.queued_tokens
        self._queued_tokens -= budget - left
        for request in batch:
            if not request.has_started:
                request.has_started = True
                self._recorder.started(now - request.submitted_at)
        self._waiting = [request for request in self._waiting if request.queued]
        self._running = list(batch)
        return batch

    def _run(self, batch: _Batch) -> None:
        sequences = [request.sequences[index] for request, indices in batch.items() for index in indices]
        started = time.monotonic()
        try:
            logits = self._score(sequences)
            if len(logits) != len(sequences):
                raise RuntimeError(f"{len(sequences)} sequences gave {len(logits)} scores")
        except Exception as error:
            self._recover(batch, error)
            return
        with self._changed:
            self._recorder.computed(
                num_requests=len(batch),
                num_pairs=len(sequences),
                num_tokens=sum(map(len, sequences)),
                budget=self._max_batch_tokens(),
                compute_s=time.monotonic() - started,
            )
        values = iter(logits)
        for request, indices in batch.items():
            for index in indices:
                request.logits[index] = next(values)
            request.num_unfinished -= len(indices)
            self._report(request, len(indices))
        with self._changed:
            # Not before: a worker that ended on the way here would have forgotten whom it owes an answer.
            self._running = [request for request in self._running if request not in batch]

    def _report(self, request: _Request, num_finished: int) -> None:
        """Tell a request's owner of progress, and of the result if that was the last of it."""
        try:
            if request.on_progress is not None:
                request.on_progress(num_finished)
        except Exception as error:  # a fault of the caller's own
            self._fail(request, error)
        if request.num_unfinished == 0 and self._claim(request):
            request.future.set_result(request.logits)

    def _recover(self, batch: _Batch, error: Exception) -> None:
        if self._is_device_lost is not None and self._is_device_lost(error):
            with self._changed:
                self._lost = error
            logger.error("the device is lost: %s", type(error).__name__)
            self._fail_all(_device_lost(error))
        elif len(batch) == 1:
            for request in batch:
                self._fail(request, error)
        else:
            for request, indices in batch.items():
                if not request.future.done():
                    self._run({request: indices})

    def _fail(self, request: _Request, error: BaseException) -> None:
        self._drop(request)
        if self._claim(request):
            with self._changed:
                self._recorder.failed += 1
            request.future.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            requests = dict.fromkeys([*self._running, *self._waiting])
            self._running = []
        for request in requests:
            self._fail(request, error)

    def _claim(self, request: _Request) -> bool:
        """Whether the caller, of all threads that may want to, is the one to end this request."""
        with self._changed:
            if request.is_claimed:
                return False
            request.is_claimed = True
        return request.future.set_running_or_notify_cancel()

    def _drop(self, request: _Request) -> None:
        """Forget what of a request has not started."""
        with self._changed:
            if request.future.cancelled():
                self._recorder.cancelled += 1
            if request in self._waiting:
                self._waiting.remove(request)
                self._queued_tokens -= request.queued_tokens
                request.queued.clear()
                self._changed.notify_all()


class _Request:
    """One caller's sequences on their way."""

    def __init__(
        self, sequences: Sequence[IntArray], on_progress: Callable[[int], object] | None = None
    ) -> None:
        self.sequences = sequences
        self.on_progress = on_progress
        self.future: Future[list[float]] = Future()
        self.logits = [0.0] * len(sequences)
        self.num_unfinished = len(sequences)
        # Longest last, to be taken from the end: neighbours in a batch are then of like length.
        self.queued = sorted(range(len(sequences)), key=lambda index: (len(sequences[index]), -index))
        self.queued_tokens = sum(map(len, sequences))
        self.submitted_at = time.monotonic()
        self.has_started = False
        self.is_claimed = False

    def take(self, max_tokens: int, *, at_least_one: bool) -> list[int]:
        """Take the longest sequences that fit, or one that does not where one must be taken."""
        taken: list[int] = []
        while self.queued:
            length = len(self.sequences[self.queued[-1]])
            if length > max_tokens and (taken or not at_least_one):
                break
            taken.append(self.queued.pop())
            self.queued_tokens -= length
            max_tokens -= length
        return taken


def _device_lost(cause: BaseException) -> DeviceLostError:
    error = DeviceLostError(f"the device failed ({type(cause).__name__}) and needs a new process")
    error.__cause__ = cause
    return error


def _end_all() -> None:
    """Let no computation run into the interpreter's end, where its thread would be torn down.

    Who still waits is a daemon thread, to be torn down as well: an error would only be printed.
    """
    deadline = time.monotonic() + _EXIT_S
    workers = [batcher._abandon() for batcher in list(_live)]
    for worker in workers:
        if worker is not None:
            worker.join(max(deadline - time.monotonic(), 0))


atexit.register(_end_all)
