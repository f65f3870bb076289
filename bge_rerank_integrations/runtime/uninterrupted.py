"""Calls functions that Ctrl-C, or another signal handler that raises, must not stop half-way."""

from __future__ import annotations

import _thread
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from bge_rerank_integrations.runtime.shutdown import end_at_exit

T = TypeVar("T")

# One lock for each running call of `call_uninterrupted`, which is taken until the call has ended.
_running: set[threading.Lock] = set()
_importing = threading.Lock()


def run_uninterrupted(function: Callable[[], object]) -> None:
    """Call a function and wait for it. Ctrl-C ends the wait, but not the function.

    Python raises `KeyboardInterrupt` in the main thread only, so the function runs in another one.

    Args:
        function: Takes a moment, and raises no exception.

    Example:
        >>> run_uninterrupted(partial(future.set_result, 1))
    """
    if threading.current_thread() is not threading.main_thread():
        function()
        return
    calls = [function]
    is_over = threading.Lock()
    is_over.acquire()

    def run() -> None:
        try:
            calls.pop()()  # so that the thread refers to nothing of the function when it reports its end
        finally:
            is_over.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # too many threads in the process
        function()
        return
    with is_over:
        pass


def call_uninterrupted(function: Callable[[], T]) -> T:
    """Call a function and return its result. Ctrl-C ends the wait, but not the function.

    Libraries do not expect that a signal handler raises an exception in them. torch can then not be imported
    again, and others take the exception for a damaged file.

    Args:
        function: May take long. It should call `raise_if_exiting` now and then, because interpreter exit
            waits for it. In the main thread, it runs in another thread with a copy of the context variables.

    Returns:
        The result of the function.

    Raises:
        BaseException: The exception of the function, or of a signal handler.

    Example:
        >>> call_uninterrupted(lambda: 1)
        1
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    outcome: list[tuple[T, None] | tuple[None, BaseException]] = []
    is_over = threading.Lock()
    is_over.acquire()
    context = contextvars.copy_context()

    def run() -> None:
        _running.add(is_over)
        try:
            outcome.append((context.run(function), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            _running.discard(is_over)
            is_over.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # too many threads in the process
        return function()
    with is_over:
        result, error = outcome.pop()  # the exception refers to `outcome`, which must not refer to it
    if error is not None:
        try:
            raise error
        finally:
            del error
    return result  # type: ignore[return-value]


@contextmanager
def importing() -> Iterator[None]:
    """Let interpreter exit wait for this block, which imports torch. It would abort in the middle."""
    with _importing:
        yield


def _end_all(deadline: float) -> None:
    with _importing:
        pass
    for is_over in list(_running):
        if is_over.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            is_over.release()


end_at_exit(_end_all)
