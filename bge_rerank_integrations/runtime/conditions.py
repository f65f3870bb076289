"""A condition variable and a future whose locks survive Ctrl-C.

Python raises `KeyboardInterrupt` between two steps of Python code in the main thread. `__enter__` of
`threading.Condition` is Python code that takes a lock. An interrupt at its end leaves the lock taken, and the
worker threads, which need the lock, then wait for ever. `__enter__` of `RLock` is a single step.
"""

from __future__ import annotations

import threading
from _thread import RLock
from collections import deque
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class SafeCondition(RLock, threading.Condition):  # type: ignore[misc]  # CPython allows it
    """A condition variable that is its own lock. It is entered and left in one step."""

    def __init__(self) -> None:
        # `threading.Condition` would refer to its lock, which is this object. Such a cycle is freed only by
        # the garbage collector.
        self._waiters: deque[object] = deque()


class SafeFuture(Future[T]):
    """A future whose lock survives Ctrl-C in the thread that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = SafeCondition()
