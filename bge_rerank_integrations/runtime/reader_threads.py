"""Reads iterators of the caller in threads of their own, for async callers.

Reading may take long or wait for the event loop. It must block neither the event loop nor the threads that
tokenize. It may also never end. The threads are therefore daemons, and interpreter exit waits for them for
a short time only.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from bge_rerank_integrations.runtime.shutdown import end_at_exit, join_until

T = TypeVar("T")
_Calls = SimpleQueue[tuple[Future[Any], Callable[[], object]] | None]

# Longest time in seconds that interpreter exit waits. The threads that compute need the rest of the time.
_EXIT_S: Final = 1.0

_live: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a separate thread, and return its result."""
    reader = _Reader()
    try:
        return await reader.call(function, *args)
    finally:
        reader.end()


async def read_in_thread(items: Iterator[T]) -> AsyncGenerator[T]:
    """Yield the items of an iterator. All of them are read in one separate thread."""
    reader = _Reader()
    try:
        while (item := await reader.call(next, items, None)) is not None:
            yield item
    finally:
        reader.end()


class _Reader:
    """A thread that calls functions one after the other."""

    def __init__(self) -> None:
        self._calls: _Calls = SimpleQueue()
        # The thread has no reference to this object.
        thread = threading.Thread(
            target=_take_calls, args=(self._calls,), name="bge-rerank-read", daemon=True
        )
        thread.start()
        _live.add(thread)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the thread, and return its result."""
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *args)))
        return await asyncio.wrap_future(future)

    def end(self) -> None:
        """Let the thread end after its current call."""
        self._calls.put(None)


def _take_calls(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        _run(*call)
        del call  # it refers to the result


def _run(future: Future[Any], function: Callable[[], object]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except StopIteration as error:
        # A future of asyncio takes no `StopIteration`. Generators replace it by the same error.
        replaced = RuntimeError("reading the input raised StopIteration")
        replaced.__cause__ = error
        future.set_exception(replaced)
        del future, replaced
    except BaseException as error:
        future.set_exception(error)
        del future  # the traceback of the exception refers to this frame
    else:
        future.set_result(result)


def _end_all(deadline: float) -> None:
    deadline = min(deadline, time.monotonic() + _EXIT_S)
    join_until(list(_live), deadline)


end_at_exit(_end_all)
