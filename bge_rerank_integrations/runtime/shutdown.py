"""Stops running forward passes, and the threads that compute them, when the interpreter exits.

At exit no caller waits for a score any more, because `threading` has joined every thread that is not a
daemon. A forward pass over a large batch can still take many seconds. If a daemon thread computes while the
interpreter shuts down, the process aborts. Modules that run threads therefore end them with `end_at_exit`,
and models call `raise_if_exiting` before each layer.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from bge_rerank_integrations.errors import ScorerClosedError
from bge_rerank_integrations.runtime.fork_guard import was_forked

# Longest time in seconds that interpreter exit waits for all threads of this package.
_EXIT_S: Final = 4.0
# Time in seconds between two checks of a condition.
_FIRST_PAUSE_S: Final = 0.0002
_LONGEST_PAUSE_S: Final = 0.01

_is_exiting = False
_ends: list[Callable[[float], None]] = []


def end_at_exit(end: Callable[[float], None]) -> None:
    """Call a function at interpreter exit, which ends threads.

    Args:
        end: Ends threads and waits for them up to the given time, by `time.monotonic`. The function that was
            registered last is called first.
    """
    _ends.append(end)
    # The interpreter calls first what was registered last. Threads must end before the cleanup of libraries
    # that are already imported, such as torch.
    atexit.unregister(_end_all)
    atexit.register(_end_all)


def is_exiting() -> bool:
    """Return whether the interpreter has begun to exit."""
    return _is_exiting


def raise_if_exiting() -> None:
    """Raise `ScorerClosedError` once the interpreter has begun to exit."""
    if _is_exiting:
        raise ScorerClosedError("the interpreter is exiting")


def join_until(threads: Iterable[threading.Thread], deadline: float | None) -> bool:
    """Wait until threads have ended. The current thread is left out, because it cannot wait for itself.

    Args:
        threads: Threads that have been started.
        deadline: Time at which to stop waiting, by `time.monotonic`; None for no limit.

    Returns:
        Whether all threads have ended.
    """
    others = {thread for thread in threads if thread is not threading.current_thread()}
    # If Ctrl-C interrupts `Thread.join`, Python before 3.13 takes the running thread for an ended one. Nobody
    # would wait for it at exit, and the process would abort. So the main thread joins only ended threads.
    if not wait_while(lambda: _any_running(others), deadline):
        return False
    for thread in others:
        thread.join()
    return True


def wait_while(condition: Callable[[], bool], deadline: float | None) -> bool:
    """Wait while a condition holds, and check it at least every 10 ms.

    Args:
        condition: Called in this thread.
        deadline: Time at which to stop waiting, by `time.monotonic`; None for no limit.

    Returns:
        Whether the condition no longer holds.
    """
    pause_s = _FIRST_PAUSE_S
    while condition():
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return True


def _any_running(threads: set[threading.Thread]) -> bool:
    if sys.version_info >= (3, 14):
        # In Python 3.14, Ctrl-C in `threading.enumerate` could leave its lock taken (see `SafeLock`). Then no
        # thread of the process could start or end.
        return any(thread.is_alive() for thread in threads)
    return not threads.isdisjoint(threading.enumerate())


def _end_all() -> None:
    global _is_exiting
    if was_forked():
        return  # the threads exist in the parent process only
    _is_exiting = True
    deadline = time.monotonic() + _EXIT_S
    for end in reversed(_ends):
        end(deadline)
