"""Shares the work of one call between threads, as torch shares its own operations."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise

import torch

Work = Callable[[int, int], None]


def _new_executor() -> ThreadPoolExecutor:
    """Return an executor that starts a thread only when all others are busy. Python joins them at exit."""
    return ThreadPoolExecutor(os.cpu_count(), "bge-rerank-share")


_executor = _new_executor()


def share(work: Work, num_items: int) -> None:
    """Call `work(start, end)` for parts of some items, on as many threads as torch uses in this thread.

    Args:
        work: Processes the items from `start` to before `end`. It should release the interpreter's lock for
            most of its time.
        num_items: The number of items.
    """
    num_parts = max(1, min(torch.get_num_threads(), num_items))
    bounds = [num_items * part // num_parts for part in range(num_parts + 1)]
    own, *others = pairwise(bounds)
    futures = [_submit(work, *part) for part in others]
    try:
        work(*own)
    finally:
        wait(futures)
    for future in futures:
        future.result()


def _submit(work: Work, start: int, end: int) -> Future[None]:
    global _executor
    done: Future[None] = Future()
    calls = [(work, start, end, done)]
    try:
        _executor.submit(_compute, calls)
    except RuntimeError:  # the interpreter is exiting, or the process can have no more threads
        _executor = _new_executor()  # the old one keeps the task until one of its threads, if any, is free
        _compute(calls)
    return done


def _compute(calls: list[tuple[Work, int, int, Future[None]]]) -> None:
    """Compute a part, unless another thread has already taken it from the list."""
    try:
        work, start, end, done = calls.pop()
    except IndexError:
        return
    try:
        work(start, end)
    except BaseException as error:
        done.set_exception(error)
        del done  # the traceback of the error refers to this frame
    else:
        done.set_result(None)
