"""Calls functions that Ctrl-C, or another signal handler that raises, must not stop half-way."""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module

from bge_rerank_integrations.runtime.fork_guard import call_in_forked_children
from bge_rerank_integrations.runtime.shutdown import end_at_exit

# A lock for each running import, which is taken until the import has ended.
_imports: set[threading.Lock] = set()


def run_uninterrupted(function: Callable[[], object]) -> None:
    """Call a function and wait for it. Ctrl-C ends the wait, but not the function.

    Python raises `KeyboardInterrupt` in the main thread only, so the function runs in another one.

    Args:
        function: Returns quickly, and raises no exception.

    Example:
        >>> run_uninterrupted(partial(future.set_result, 1))
    """
    if not _gets_signals():
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


def import_uninterrupted(name: str) -> None:
    """Import a module. An exception of a signal handler, such as Ctrl-C, is raised when the import has ended.

    torch and numba cannot be imported again in a process in which an exception has ended their import. A
    second Ctrl-C is raised at once. Under gevent, which runs all threads in one, Ctrl-C does end the import.

    Args:
        name: Full name of the module.

    Raises:
        Exception: The exception of the import.

    Example:
        >>> import_uninterrupted("torch")
    """
    # This thread itself may be importing the module. Another thread would wait for it for ever.
    if name in sys.modules or not _gets_signals():
        import_module(name)
        return
    errors: list[BaseException] = []
    # One lock for each place that waits. An interrupted `acquire` may have taken its lock.
    is_over, is_over_after_interrupt, is_over_at_exit = locks = [threading.Lock() for _ in range(3)]
    for lock in locks:
        lock.acquire()

    def run() -> None:
        _imports.add(is_over_at_exit)
        try:
            import_module(name)
        except BaseException as error:
            errors.append(error)
        finally:
            _imports.discard(is_over_at_exit)
            for lock in locks:
                lock.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # too many threads in the process
        import_module(name)
        return
    try:
        is_over.acquire()
    except BaseException:
        is_over_after_interrupt.acquire()
        raise
    if errors:
        raise errors.pop()  # its traceback refers to `errors`


def _gets_signals() -> bool:
    """Return whether signal handlers may raise in this thread. At exit this is False: no thread can start."""
    return threading.current_thread() is threading.main_thread() and not sys.is_finalizing()


def _end_imports(deadline: float) -> None:
    """Wait for imports at interpreter exit. A process that ends during an import of torch may abort."""
    for is_over in list(_imports):
        is_over.acquire(timeout=max(deadline - time.monotonic(), 0.0))


end_at_exit(_end_imports)
call_in_forked_children(_imports.clear)  # the importing threads exist in the parent only
