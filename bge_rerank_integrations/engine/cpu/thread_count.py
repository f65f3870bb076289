"""Sets the number of CPU threads that torch uses in one thread, and leaves it as it is in all others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from bge_rerank_integrations.runtime.fork_guard import call_in_forked_children

_lock = threading.Lock()


@contextmanager
def kept_default() -> Iterator[None]:
    """Keep the number of torch threads that new threads start with, while this block changes another number.

    In torch, a thread starts with the number that any thread set last. Without this block, a thread of the
    application that uses torch for the first time would keep a number that was meant for a thread of this
    package. Within the block, which takes less than a millisecond, it still would.
    """
    has_read, is_over = threading.Event(), threading.Event()

    def keep() -> None:
        default = torch.get_num_threads()  # the default, because this thread is new
        has_read.set()
        is_over.wait()
        torch.set_num_threads(default)

    # Two blocks at the same time would read each other's numbers.
    with _lock:
        keeper = threading.Thread(target=keep, name="bge-rerank-default-threads", daemon=True)
        try:
            with suppress(RuntimeError):  # too many threads in the process; the default then changes
                keeper.start()
            if keeper.ident is not None:
                has_read.wait()
            yield
        finally:
            is_over.set()
            if keeper.ident is not None:
                keeper.join()


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
    _lock = threading.Lock()  # a thread of the parent may have held it


call_in_forked_children(_renew_lock)
