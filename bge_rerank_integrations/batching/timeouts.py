"""Waits for futures and iterators with a timeout, in threads and in asyncio tasks."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final, TypeVar

from bge_rerank_integrations.errors import RequestTimeoutError
from bge_rerank_integrations.validation import check_timeout

T = TypeVar("T")
Countdown = Callable[[], float | None]
"""Returns the remaining seconds of a call, or None if the call has no timeout."""

_NOT_LOCKED: Final = "cannot release un-acquired lock"
_TIMED_OUT: Final = "the call did not finish within its timeout; sequences that had not started were dropped"


def start_countdown(timeout: float | None) -> Countdown:
    """Check a timeout in seconds, and start to count it down. None means no limit."""
    check_timeout(timeout)
    if timeout is None:
        return lambda: None
    deadline = time.monotonic() + timeout
    return lambda: max(deadline - time.monotonic(), 0.0)


def wait(future: Future[T], timeout: float | None) -> T:
    """Wait for a future. When the timeout expires or the thread is interrupted, cancel the future."""
    try:
        return future.result(timeout)
    except BaseException as error:  # the time is over, the thread was interrupted, or the future has failed
        was_cancelled = future.cancel()
        if isinstance(error, FutureTimeoutError) and _is_of_wait(error):
            if not was_cancelled:  # it has ended just now
                return future.result()
            raise RequestTimeoutError(_TIMED_OUT) from None
        if type(error) is RuntimeError and str(error) == _NOT_LOCKED and error.__context__ is not None:
            # Ctrl-C came while `Condition.wait` took its lock again, so that the `with` block could not
            # release it. This error hides the KeyboardInterrupt.
            raise error.__context__ from None
        raise


def _is_of_wait(error: FutureTimeoutError) -> bool:
    """Return whether the call of `Future.result` in `wait` has raised an error itself.

    A signal handler may raise the same type, and so may the work of the future.
    """
    raised_in = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return raised_in[1:] == [Future.result.__code__]


async def await_future(future: Future[T], timeout: float | None) -> T:
    """Do the same as `wait` in an asyncio task."""
    wrapped = asyncio.wrap_future(future)
    try:
        done, _ = await asyncio.wait({wrapped}, timeout=timeout)
    except asyncio.CancelledError:
        wrapped.cancel()
        future.cancel()
        raise
    if done:
        return wrapped.result()
    wrapped.cancel()
    future.cancel()
    raise RequestTimeoutError(_TIMED_OUT)


async def next_item(items: AsyncIterator[T], remaining: Countdown) -> T | None:
    """Return the next item, or None after the last one."""
    return await await_within(anext(items, None), remaining)


async def await_within(awaitable: Awaitable[T], remaining: Countdown) -> T:
    """Await something in this task, and raise `RequestTimeoutError` when the timeout expires."""
    try:
        if sys.version_info < (3, 11):
            return await asyncio.wait_for(awaitable, remaining())  # in a task of its own
        async with asyncio.timeout(remaining()):
            return await awaitable
    except asyncio.TimeoutError:
        if remaining() == 0:
            raise RequestTimeoutError(_TIMED_OUT) from None
        raise  # the awaitable itself has raised this
