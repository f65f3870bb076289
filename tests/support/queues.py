"""Helpers for tests of the queue: sequences whose score is their first id, and devices that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from bge_rerank_integrations.text.tokenization import IntArray

PATIENCE_S = 120.0  # even on a busy machine, only a call that hangs takes so long


def ids(*values: int) -> IntArray:
    """Return a sequence. `firsts` and `Gate` score it with its first id."""
    return np.array(values, dtype=np.int32)


def sized(value: int, length: int) -> IntArray:
    return np.full(length, value, dtype=np.int32)


def firsts(batch: list[IntArray]) -> list[float]:
    return [float(sequence[0]) for sequence in batch]


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


def results(futures: list[Future[list[float]]]) -> list[list[float]]:
    return [future.result(PATIENCE_S) for future in futures]
