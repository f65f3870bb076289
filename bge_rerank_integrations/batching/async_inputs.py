"""Reads the input of async calls without blocking the event loop.

An iterator is read in a separate thread, and an asynchronous iterator in the caller's task.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Sequence

from bge_rerank_integrations.batching.timeouts import Countdown, await_within
from bge_rerank_integrations.runtime.reader_threads import read_in_thread, run_in_thread
from bge_rerank_integrations.validation import Pair, acheck_stream, check_requests, check_stream


def aread_pairs(pairs: Iterator[Pair] | AsyncIterable[Pair], num_pairs: int) -> AsyncGenerator[list[Pair]]:
    """Yield checked lists of at most `num_pairs` pairs. Close the generator, so that its thread ends."""
    if isinstance(pairs, AsyncIterable):
        return acheck_stream(pairs, num_pairs)
    return read_in_thread(check_stream(pairs, num_pairs))


async def aread_requests(
    requests: Iterable[tuple[str, Sequence[str]]], remaining: Countdown
) -> list[tuple[str, list[str]]]:
    """Do the same as `check_requests` within a time limit."""
    if isinstance(requests, Iterator):
        return await await_within(run_in_thread(check_requests, requests), remaining)
    return check_requests(requests)
