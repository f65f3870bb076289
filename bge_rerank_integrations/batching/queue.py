"""The waiting list: decides which sequences go into the next batch.

It has no lock of its own. `MicroBatcher` calls it under its lock.
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


class WaitingList:
    """The requests with sequences that wait for a batch, oldest first.

    Attributes:
        num_tokens: Total number of tokens of the waiting sequences.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def oldest(self) -> Request:
        """The request that has waited longest."""
        return self._requests[0]

    def add(self, request: Request, indices: Iterable[int]) -> None:
        """Add sequences of a request. The request may already have other sequences in the list."""
        before = request.queued_tokens
        request.queue(indices)
        self.num_tokens += request.queued_tokens - before
        if before == 0:
            insort(self._requests, request, key=lambda each: each.submitted_at)

    def drop(self, request: Request) -> None:
        """Remove the waiting sequences of a request."""
        if request.queued_tokens:
            self._requests.remove(request)
            self.num_tokens -= request.queued_tokens
            request.clear()

    def clear(self) -> None:
        """Remove all requests."""
        for request in self._requests:
            request.clear()
        self._requests.clear()
        self.num_tokens = 0

    def even_share(self, num_devices: int) -> int:
        """Return the number of tokens for each idle device, if these devices share all waiting tokens."""
        num_shares = min(num_devices, self.num_tokens // _WORTH_SHARING_TOKENS)
        return -(-self.num_tokens // max(num_shares, 1))

    def take(self, max_tokens: int) -> Batch:
        """Move sequences into a batch of at most `max_tokens`. A longer sequence is a batch of its own."""
        batch: Batch = {}
        oldest = self.oldest
        quotas = [(oldest, int(max_tokens * _OLDEST_SHARE))]
        quotas += [(request, max_tokens) for request in sorted(self._requests, key=lambda r: r.queued_tokens)]
        left = max_tokens
        for request, quota in quotas:
            before = request.queued_tokens
            indices = request.take(min(left, quota), at_least_one=not batch)
            if indices:
                batch.setdefault(request, []).extend(indices)
                left -= before - request.queued_tokens
        for request in batch:
            request.turn()
        self.num_tokens -= max_tokens - left
        self._requests = [request for request in self._requests if request.queued_tokens]
        return batch
