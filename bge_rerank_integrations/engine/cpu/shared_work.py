"""Shares the work of one call between threads, as torch shares its own operations."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Final

import torch

# It starts a thread only when all others are busy. Python joins the threads at exit.
_executor: Final = ThreadPoolExecutor(os.cpu_count(), "bge-rerank-share")


def share(work: Callable[[int, int], None], num_items: int) -> None:
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


def _submit(work: Callable[[int, int], None], start: int, end: int) -> Future[None]:
    try:
        return _executor.submit(work, start, end)
    except RuntimeError:  # the interpreter is exiting
        work(start, end)
        done: Future[None] = Future()
        done.set_result(None)
        return done
