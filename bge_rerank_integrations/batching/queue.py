"""The queue: decides which sequences go into the next batch.

`MicroBatcher` decides when a batch starts, and how many tokens it may have. It calls the queue under its
lock, because the queue has none. Ctrl-C can end `add` or `drop` between any two steps, in the thread of a
caller. They therefore change the list of requests before the number of tokens, which is counted again for
each batch, and is 0 if the list is empty.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from typing import Final

from bge_rerank_integrations.batching.request import Batch, Request

# This share of each batch is reserved for the oldest request. The requests with the fewest waiting tokens
# fill the rest. Short requests can overtake long ones, and long requests still make progress in every batch.
_OLDEST_SHARE: Final = 0.25
# A batch with fewer tokens does not fill a GPU. Splitting it over several devices would not be faster.
_WORTH_SHARING_TOKENS: Final = 2048
# A batch with a smaller share of the token budget is not launched behind another one. It waits until the
# device is idle. Until then other requests can join it, and the device computes the fuller batch in about the
# same time.
_WORTH_LAUNCHING_AHEAD: Final = 1 / 8


class RequestQueue:
    """The requests with sequences that wait for a batch, oldest first."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def num_tokens(self) -> int:
        """Total number of tokens of the waiting sequences."""
        return max(self._num_tokens, 0) if self._requests else 0

    @property
    def oldest(self) -> Request:
        """The request that has waited longest."""
        return self._requests[0]

    def add(self, request: Request, indices: Iterable[int]) -> None:
        """Add new sequences of a request. The request may already have other sequences in the queue."""
        before = request.queued_tokens
        request.queue(indices)
        self._count(request, before)

    def put_back(self, request: Request, indices: Iterable[int]) -> None:
        """Add sequences again that were taken for a batch. Nothing happens if their request is over."""
        if not request.is_over:
            before = request.queued_tokens
            request.put_back(indices)
            self._count(request, before)

    def drop(self, request: Request) -> None:
        """Remove the waiting sequences of a request."""
        num_tokens = request.queued_tokens
        if request in self._requests:
            self._requests.remove(request)
            self._num_tokens -= num_tokens
        request.clear()

    def clear(self) -> None:
        """Remove all requests."""
        for request in self._requests:
            request.clear()
        self._requests.clear()

    def is_worth_launching_ahead(self, max_tokens: int) -> bool:
        """Return whether to launch a batch of at most `max_tokens` on a device that computes another one."""
        return self.num_tokens >= max_tokens * _WORTH_LAUNCHING_AHEAD

    def even_share(self, num_devices: int) -> int:
        """Return the number of tokens for each device, if these devices share all waiting tokens."""
        num_shares = min(num_devices, self.num_tokens // _WORTH_SHARING_TOKENS)
        return -(-self.num_tokens // max(num_shares, 1))

    def take(self, max_tokens: int) -> Batch:
        """Move sequences into a batch of at most `max_tokens`. A longer sequence is a batch of its own."""
        batch: Batch = {}
        oldest = self.oldest
        if oldest.runs_alone:
            quotas = [(oldest, max_tokens)]
        else:
            sharing = [request for request in self._requests if not request.runs_alone]
            quotas = [(oldest, int(max_tokens * _OLDEST_SHARE))]
            quotas += [(request, max_tokens) for request in sorted(sharing, key=lambda r: r.queued_tokens)]
        left = max_tokens
        for request, quota in quotas:
            before = request.queued_tokens
            indices = request.take(min(left, quota), at_least_one=not batch)
            if indices:
                batch.setdefault(request, []).extend(indices)
                left -= before - request.queued_tokens
        for request in batch:
            request.start_next_part()
        self._requests = [request for request in self._requests if request.queued_tokens]
        self._num_tokens = sum(request.queued_tokens for request in self._requests)
        return batch

    def _count(self, request: Request, before: int) -> None:
        if not self._requests:
            self._num_tokens = 0
        if before == 0 and request.queued_tokens:
            insort(self._requests, request, key=lambda each: each.submitted_at)
        self._num_tokens += request.queued_tokens - before
