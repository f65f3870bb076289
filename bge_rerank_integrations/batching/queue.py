"""Whose turn it is: the requests that wait, and the batches that are filled from them.

Pure policy, under the lock of its owner.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from typing import Final

from bge_rerank_integrations.batching.request import Batch, Request

# A share of each batch goes to whoever waits longest, the rest to whoever needs least: short requests pass
# long ones, and long ones are never at a standstill.
_OLDEST_SHARE: Final = 0.25
# A smaller batch leaves a GPU so far from full that sharing it with another would gain nothing.
_WORTH_SHARING_TOKENS: Final = 2048


class WaitingList:
    """Requests that have sequences which have not started, oldest first.

    Attributes:
        num_tokens: Tokens of these sequences.
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
        """Whoever waits longest."""
        return self._requests[0]

    def add(self, request: Request, indices: Iterable[int]) -> None:
        """Let sequences of a request wait, whether or not others of it do."""
        before = request.queued_tokens
        request.queue(indices)
        self.num_tokens += request.queued_tokens - before
        if before == 0:
            insort(self._requests, request, key=lambda each: each.submitted_at)

    def drop(self, request: Request) -> None:
        """Forget what of a request has not started."""
        if request.queued_tokens:
            self._requests.remove(request)
            self.num_tokens -= request.queued_tokens
            request.clear()

    def clear(self) -> None:
        """Forget everything."""
        for request in self._requests:
            request.clear()
        self._requests.clear()
        self.num_tokens = 0

    def even_share(self, num_devices: int) -> int:
        """Return how many tokens go to each of some idle devices, if all that waits goes to them now."""
        num_shares = min(num_devices, self.num_tokens // _WORTH_SHARING_TOKENS)
        return -(-self.num_tokens // max(num_shares, 1))

    def take(self, max_tokens: int) -> Batch:
        """Move sequences into a batch of so many tokens; one that is longer is a batch by itself."""
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
