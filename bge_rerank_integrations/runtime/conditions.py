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


class SafeCondition(RLock, threading.Condition):  # type: ignore[misc]
    """A condition variable that is its own lock. It is entered and left in one step.

    `wait` and `notify` come from `threading.Condition`. They call `_release_save`, `_acquire_restore` and
    `_is_owned`, which are here those of `RLock`.
    """

    def __init__(self) -> None:
        # `Condition.__init__` would also set `_lock` to this object itself. Such a cycle is freed only by the
        # garbage collector.
        self._waiters: deque[object] = deque()


class SafeFuture(Future[T]):
    """A future whose lock survives Ctrl-C in the thread that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = SafeCondition()
