"""Reads iterators of the caller in threads of their own, for async callers.

Reading may take long or wait for the event loop. It must block neither the event loop nor the threads that
tokenize.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a separate thread, and return its result."""
    executor = ThreadPoolExecutor(1, "bge-rerank-read")
    try:
        return await asyncio.wrap_future(executor.submit(function, *args))
    finally:
        executor.shutdown(wait=False)


async def read_in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield the items of an iterator. All of them are read in one separate thread."""
    executor = ThreadPoolExecutor(1, "bge-rerank-read")
    try:
        while (item := await asyncio.wrap_future(executor.submit(next, items, None))) is not None:
            yield item
    finally:
        executor.shutdown(wait=False)
