"""Sets the number of CPU threads that torch uses in one thread, and leaves it as it is in all others."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from bge_rerank_integrations.runtime.fork_guard import call_in_forked_children
from bge_rerank_integrations.runtime.locks import SafeLock

_T = TypeVar("_T")

_lock = SafeLock()


# The functions of this module are not context managers. Ctrl-C between `__enter__` and the block would leave
# the generator of a context manager suspended, with the lock taken, for as long as anything refers to the
# traceback. IPython, for example, keeps the last one.


def keep_default(change: Callable[[], None]) -> None:
    """Call a function that sets numbers of torch threads, and keep the number that new threads start with.

    In torch, a thread starts with the number that any thread set last. A thread of the application that uses
    torch for the first time would therefore keep a number that was meant for a thread of this package. It
    still does if it starts during the call, which takes less than a millisecond.

    Args:
        change: Sets the number of the calling thread, or starts threads that set theirs.
    """
    # The thread that restores the default starts before the change. Ctrl-C could prevent a later start.
    # Plain locks, each released once. Ctrl-C in `Thread.start`, `Thread.join` or `Event.wait` can leave the
    # lock inside it taken.
    has_read, is_over, has_restored = (_acquired_lock() for _ in range(3))

    def keep() -> None:
        try:
            default = torch.get_num_threads()  # the default, because this thread is new
            has_read.release()
            is_over.acquire()
            torch.set_num_threads(default)
        finally:
            has_restored.release()

    # Two calls at the same time would read each other's numbers.
    with _lock:
        has_keeper = False
        try:
            has_keeper = _starts_thread(keep)
            if has_keeper:
                has_read.acquire()
            change()
        finally:
            is_over.release()
            if has_keeper:
                has_restored.acquire()


def _acquired_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _starts_thread(run: Callable[[], None]) -> bool:
    """Start a thread. Return False if the process can have no more; the default then changes."""
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:
        return False
    return True


def set_thread_count(num_threads: int) -> None:
    """Let the calling thread compute with this many CPU threads."""
    # The first use of torch in a thread overwrites the thread's number, so read it before setting it.
    if torch.get_num_threads() != num_threads:
        keep_default(lambda: torch.set_num_threads(num_threads))


def call_with_threads(num_threads: int, function: Callable[[], _T]) -> _T:
    """Call a function that computes with this many CPU threads. Other functions keep the caller's number."""
    before = torch.get_num_threads()
    try:
        set_thread_count(num_threads)
        return function()
    finally:
        set_thread_count(before)


def _renew_lock() -> None:
    global _lock
    _lock = SafeLock()  # a thread of the parent may have held it


call_in_forked_children(_renew_lock)
