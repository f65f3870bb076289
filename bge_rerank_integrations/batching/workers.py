"""The threads that run batches. A worker takes batches from the queue, and runs them on one device.

A device that computes asynchronously holds several batches. One thread launches the next batch while the
device computes, and another thread waits for the oldest batch and reports its results. A device with a depth
of 1 is done with a batch when its launch returns, so one thread does both.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, NamedTuple, Protocol

from bge_rerank_integrations.batching.request import Batch
from bge_rerank_integrations.errors import ScorerClosedError
from bge_rerank_integrations.runtime.shutdown import join_until
from bge_rerank_integrations.runtime.tracebacks import release_frames
from bge_rerank_integrations.text.tokenization import IntArray

logger = logging.getLogger(__name__)

# All workers that were started. Exit also waits for workers that their batcher no longer lists.
_threads: Final[weakref.WeakSet[threading.Thread]] = weakref.WeakSet()


class Pending(Protocol):
    """A batch that was launched."""

    def wait(self) -> list[float]:
        """Wait for the batch and return the logit of each sequence, in order. It is called once."""


class Launch(Protocol):
    """Starts a batch on a device."""

    def __call__(self, sequences: list[IntArray], *, is_alone: bool) -> Pending | None:
        """Start a batch. On a device that computes asynchronously, this returns before the batch is done.

        Args:
            sequences: int32 token ids of each sequence. No sequence is empty.
            is_alone: Whether the caller has no other batch on the device.

        Returns:
            The launched batch; None if it does not fit into memory now. Its sequences must then be scored in
            other batches: alone on the device if `is_alone` was False, else with a smaller token budget.
        """


@dataclass(eq=False)
class Replica:
    """The copy of the model on one device. Only one worker uses it.

    Attributes:
        launch: Starts a batch.
        max_batch_tokens: Returns the token budget of the next batch. A longer sequence is a batch of its own.
        depth: Number of batches that the device holds at once: the one that it computes, and others behind
            it.
    """

    launch: Launch
    max_batch_tokens: Callable[[], int]
    depth: int = 1

    def release(self) -> None:
        """Drop the references to the model. The traceback of an exception may keep this object alive."""
        self.launch = _released
        self.max_batch_tokens = lambda: 1


def _released(sequences: list[IntArray], *, is_alone: bool) -> Pending | None:  # noqa: ARG001
    raise ScorerClosedError


class Work(Protocol):
    """What a worker needs of the batcher. The methods take the batcher's lock."""

    def next_batch(self, worker: Worker) -> Batch | None:
        """Wait for the next batch and add it to `worker.running`. None means that the worker must end."""

    def complete(self, worker: Worker, batch: Batch, logits: list[float], compute_s: float) -> None:
        """Give the logits of a batch to its requests."""

    def put_back(self, worker: Worker, batch: Batch) -> None:
        """Put the sequences of a batch that did not fit into memory back into the queue."""

    def recover(self, worker: Worker, batch: Batch, error: Exception) -> None:
        """Handle the error of a batch: end its requests, or queue their sequences again."""

    def remove(self, worker: Worker) -> None:
        """Record that a worker has died, and fail the requests that it leaves."""


class _Launched(NamedTuple):
    """A batch on the device."""

    batch: Batch
    pending: Pending
    launched_at: float


class Worker:
    """Keeps one device busy with batches.

    Args:
        work: The batcher. It uses the attributes of this worker under its lock.
        replica: The replica that this worker serves.

    Attributes:
        replica: The replica that this worker serves.
        running: The batches that the device has not finished.
        answering: The batches whose results are being given to their requests.
        needs_memory: Whether the last launch did not fit into memory beside other batches. The next batch is
            launched only when the device is empty.
    """

    def __init__(self, work: Work, replica: Replica) -> None:
        self.replica = replica
        self.running: list[Batch] = []
        self.answering: list[Batch] = []
        self.needs_memory = False
        self._work = work
        self._launched: SimpleQueue[_Launched | None] = SimpleQueue()
        self._device_free_at = 0.0  # when the latest finished batch was done
        self._threads = [threading.Thread(target=self._run, name="bge-rerank-worker", daemon=True)]
        if replica.depth > 1:
            self._threads += [threading.Thread(target=self._read, name="bge-rerank-reader", daemon=True)]

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads of this worker that have not ended."""
        return [thread for thread in self._threads if thread.is_alive()]

    @property
    def batches(self) -> list[Batch]:
        """All batches that have unanswered requests."""
        return self.running + self.answering

    @property
    def has_room(self) -> bool:
        """Whether the device can hold another batch."""
        return not self.batches if self.needs_memory else len(self.batches) < self.replica.depth

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()
            _threads.add(thread)

    def _run(self) -> None:
        """Launch batches until the batcher has no more of them."""
        try:
            while batch := self._work.next_batch(self):
                self._launch(batch)
        except BaseException as error:
            self._die(error)
        finally:
            self._launched.put(None)

    def _read(self) -> None:
        """Wait for launched batches, oldest first."""
        try:
            while (launched := self._launched.get()) is not None:
                self._finish(launched)
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        self._work.remove(self)  # no caller may wait for a thread that has ended
        with suppress(Exception):  # a logging filter of the application may raise
            logger.error("a worker thread died of %s", type(error).__name__)

    def _launch(self, batch: Batch) -> None:
        launched_at = time.monotonic()
        try:
            pending = self.replica.launch(sequences_of(batch), is_alone=len(self.running) == 1)
        except Exception as error:
            release_frames(error)
            self._work.recover(self, batch, error)
            return
        if pending is None:
            self._work.put_back(self, batch)
        elif self.replica.depth == 1:
            self._finish(_Launched(batch, pending, launched_at))
        else:
            self._launched.put(_Launched(batch, pending, launched_at))

    def _finish(self, launched: _Launched) -> None:
        """Wait for a batch and answer its requests."""
        batch, pending, launched_at = launched
        try:
            logits = pending.wait()
            num_sequences = sum(map(len, batch.values()))
            if len(logits) != num_sequences:
                raise RuntimeError(f"{num_sequences} sequences gave {len(logits)} scores")
        except Exception as error:
            release_frames(error)
            self._work.recover(self, batch, error)
            return
        now = time.monotonic()
        compute_s = now - max(launched_at, self._device_free_at)
        self._device_free_at = now
        self._work.complete(self, batch, logits, compute_s)


def sequences_of(batch: Batch) -> list[IntArray]:
    """Return the int32 token ids of each sequence of a batch."""
    return [request.sequences[index] for request, indices in batch.items() for index in indices]


def join_all(deadline: float) -> None:
    """Wait until all workers of this process have ended, up to a time by `time.monotonic`."""
    join_until(list(_threads), deadline)
