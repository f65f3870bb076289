"""A lock, a condition variable and a future that survive Ctrl-C.

Python raises `KeyboardInterrupt` between two steps of Python code in the main thread. `__enter__` of
`threading.Condition` is Python code that takes a lock. An interrupt at its end leaves the lock taken, and the
worker threads, which need the lock, then wait for ever. `__enter__` of `RLock` is a single step, except in
Python 3.14.

gevent replaces the threads and locks of `threading`. All its threads run in one thread of the system. `RLock`
cannot tell them apart, so that several could hold it at once. If the locks of `threading` are replaced,
`SafeLock()` and `SafeCondition()` therefore return these.
"""

from __future__ import annotations

import sys
import threading
from _thread import RLock
from collections import deque
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def _are_replaced() -> bool:
    """Return whether a library such as gevent has replaced the locks of `threading`."""
    return not isinstance(threading.RLock(), RLock)


class SafeLock(RLock):  # type: ignore[misc]
    """A lock that the thread which holds it may take again.

    Example:
        >>> lock = SafeLock()
        >>> with lock:
        ...     pass
    """

    def __new__(cls) -> SafeLock:  # noqa: D102
        return threading.RLock() if _are_replaced() else super().__new__(cls)  # type: ignore[return-value]

    if sys.version_info[:2] == (3, 14):
        # Python 3.14 looks for Ctrl-C after `__enter__`, but before the block that calls `__exit__`
        # (https://github.com/python/cpython/issues/148874). It does not look when Python code returns. So an
        # interrupt can be raised only within the `try` below, or before it.
        def __enter__(self) -> bool:  # type: ignore[override]
            """Take the lock."""
            level: int = self._recursion_count()  # type: ignore[attr-defined]
            try:
                return self.acquire()
            except BaseException:
                if self._recursion_count() > level:  # type: ignore[attr-defined]
                    self.release()
                raise


class SafeCondition(SafeLock, threading.Condition):  # type: ignore[misc]
    """A condition variable that is its own lock. It is entered and left in one step.

    `wait` and `notify` come from `threading.Condition`. They call `_release_save`, `_acquire_restore` and
    `_is_owned`, which are here those of `RLock`.
    """

    def __new__(cls) -> SafeCondition:  # noqa: D102
        return threading.Condition() if _are_replaced() else super().__new__(cls)  # type: ignore[return-value]

    def __init__(self) -> None:
        # `Condition.__init__` would also set `_lock` to this object itself. Such a cycle is freed only by the
        # garbage collector.
        self._waiters: deque[object] = deque()


class SafeFuture(Future[T]):
    """A future whose lock survives Ctrl-C in the thread that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = SafeCondition()
