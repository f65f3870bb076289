"""Sets the number of CPU threads that torch uses in one thread, and leaves it as it is in all others."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bge_rerank_integrations.runtime.fork_guard import call_in_forked_children
from bge_rerank_integrations.runtime.locks import SafeLock

_lock = SafeLock()


@contextmanager
def kept_default() -> Iterator[None]:
    """Keep the number of torch threads that new threads start with, while this block changes another number.

    In torch, a thread starts with the number that any thread set last. Without this block, a thread of the
    application that uses torch for the first time would keep a number that was meant for a thread of this
    package. Within the block, which takes less than a millisecond, it still would.
    """
    # The thread that restores the default starts before the block. Ctrl-C could prevent a later start.
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

    # Two blocks at the same time would read each other's numbers.
    with _lock:
        has_keeper = False
        try:
            has_keeper = _starts_thread(keep)
            if has_keeper:
                has_read.acquire()
            yield
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
        with kept_default():
            torch.set_num_threads(num_threads)


@contextmanager
def thread_count(num_threads: int) -> Iterator[None]:
    """Let the calling thread compute with this many CPU threads in this block."""
    before = torch.get_num_threads()
    set_thread_count(num_threads)
    try:
        yield
    finally:
        set_thread_count(before)


def _renew_lock() -> None:
    global _lock
    _lock = SafeLock()  # a thread of the parent may have held it


call_in_forked_children(_renew_lock)
