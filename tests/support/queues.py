"""Helpers for tests of the queue: sequences whose score is their first id, and devices that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.workers import Pending, Replica
from bge_rerank_integrations.text.tokenization import IntArray

PATIENCE_S = 120.0  # even on a busy machine, only a call that hangs takes so long


def ids(*values: int) -> IntArray:
    """Return a sequence. `firsts` and `Gate` score it with its first id."""
    return np.array(values, dtype=np.int32)


def sized(value: int, length: int) -> IntArray:
    return np.full(length, value, dtype=np.int32)


def lost() -> RuntimeError:
    """Return an error that means that a device is lost."""
    return RuntimeError("CUDA error: an illegal memory access was encountered")


def firsts(batch: list[IntArray]) -> list[float]:
    return [float(sequence[0]) for sequence in batch]


def replica(score: Callable[[list[IntArray]], list[float]], budget: int = 100) -> Replica:
    """Return a replica whose launches return when the batch is done."""
    return Replica(lambda sequences, *, is_alone: Done(score(sequences)), lambda: budget)


class Done:
    """A batch whose logits, or whose error, are known."""

    def __init__(self, logits: list[float], error: BaseException | None = None) -> None:
        self.logits = logits
        self.error = error

    def wait(self) -> list[float]:
        if self.error is not None:
            raise self.error
        return self.logits


class AsyncDevice:
    """A device that holds two batches. Each is done when the test says so.

    Args:
        max_tokens: Number of tokens that fit into the memory of the device. Launches beyond it are refused.

    Attributes:
        launched: The scores of each launched batch.
        errors: For a score, the error of a batch that contains it.
        error: The error of every batch that is waited for.
        launch_error: The error of every launch.
        num_refused: Number of launches that did not fit into memory.
        num_waiting: Number of batches that are waited for now.
        num_read: Number of batches that were waited for.
    """

    depth = 2

    def __init__(self, max_tokens: int | None = None) -> None:
        self.launched: list[list[float]] = []
        self.errors: dict[float, Exception] = {}
        self.error: BaseException | None = None
        self.launch_error: Exception | None = None
        self.num_refused = self.num_waiting = self.num_read = 0
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._done = threading.Semaphore(0)

    def finish(self, num_batches: int) -> None:
        """Let the next batches be done."""
        self._done.release(num_batches)

    def launch(self, sequences: list[IntArray], *, is_alone: bool) -> Pending | None:
        if self.launch_error is not None:
            raise self.launch_error
        num_tokens = sum(map(len, sequences))
        if self._max_tokens is not None and self._num_tokens + num_tokens > self._max_tokens:
            assert not is_alone, "the batch fits into memory by itself"
            self.num_refused += 1
            return None
        self._num_tokens += num_tokens
        self.launched.append(firsts(sequences))
        return _OnDevice(self, firsts(sequences), num_tokens)

    def wait(self, logits: list[float], num_tokens: int) -> list[float]:
        self.num_waiting += 1
        assert self._done.acquire(timeout=PATIENCE_S)
        self.num_waiting -= 1
        self.num_read += 1
        self._num_tokens -= num_tokens
        errors = [self.errors[logit] for logit in logits if logit in self.errors]
        if self.error is not None:
            raise self.error
        if errors:
            raise errors[0]
        return logits


class _OnDevice:
    def __init__(self, device: AsyncDevice, logits: list[float], num_tokens: int) -> None:
        self._arguments = device, logits, num_tokens

    def wait(self) -> list[float]:
        device, logits, num_tokens = self._arguments
        return device.wait(logits, num_tokens)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Gate:
    """A score function whose calls wait until the test lets them through. It records its batches."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)
        self.batches: list[list[float]] = []
        self.current: list[float] = []
        self.error: BaseException | None = None  # the next batch raises this

    def __call__(self, batch: list[IntArray]) -> list[float]:
        self.current = firsts(batch)
        self.entered.release()
        assert self.open.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.batches.append(firsts(batch))
        return firsts(batch)

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S)

    def let_through(self, count: int = 1000) -> None:
        self.open.release(count)


def submit(
    batcher: MicroBatcher, sequences: list[IntArray], on_progress: Callable[[int], object] | None = None
) -> Future[list[float]]:
    """Queue a whole request, and return its future."""
    request = Request(on_progress)
    batcher.add(request, sequences)
    return request.future


def results(futures: list[Future[list[float]]]) -> list[list[float]]:
    return [future.result(PATIENCE_S) for future in futures]
