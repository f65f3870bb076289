"""Calls functions that Ctrl-C must not stop half-way."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable


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
