"""Runs functions in new threads, and sets the number of torch threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bge_rerank_integrations.engine.cpu.thread_count import set_thread_count


def in_new_thread(function: Callable[[], object]) -> None:
    """Run a function in a new thread and wait for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@contextmanager
def thread_count(num_threads: int) -> Iterator[None]:
    """Let this thread compute with so many CPU threads in this block."""
    before = torch.get_num_threads()
    set_thread_count(num_threads)
    try:
        yield
    finally:
        set_thread_count(before)
