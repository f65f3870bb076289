"""Statistics and health of a scorer: counts and durations, never a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final, Literal

# Percentiles cover this many of the latest requests or batches.
_WINDOW: Final = 2048

HealthState = Literal["ok", "closed", "device lost"]


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Percentiles of a duration over the latest requests or batches.

    Attributes:
        p50_ms: The median in milliseconds, 0 before the first request or batch.
        p90_ms: The 90th percentile in milliseconds.
        p99_ms: The 99th percentile in milliseconds.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class ScorerStats:
    """What a scorer has done since it was loaded.

    Attributes:
        requests: Number of requests that were queued. A call is one request. A call of `score` with an
            iterator is one request for each 4,096 pairs.
        failed: Number of requests that ended with an exception.
        cancelled: Number of requests that were cancelled or timed out.
        pairs: Number of scored sequences. Each window of a passage counts.
        tokens: Number of scored tokens.
        batches: Number of batches.
        fill: Mean share of the token budget that a batch used, from 0 to 1.
        requests_per_batch: Mean number of requests that shared a batch.
        waiting: Time from the acceptance of a request to its first batch.
        compute: Time that a device needed for a batch.
        queued_requests: Number of requests that wait now.
        queued_tokens: Number of tokens that wait now.
        duplicates: Number of pairs that shared the score of an equal pair of the same request.
        cache_hits: Number of passages whose token ids were in the cache.
        cache_misses: Number of passages that were tokenized.
        truncations: Number of pairs whose passage lost tokens.
        query_truncations: Number of queries that lost tokens, each counted once per request.
        blank_passages: Number of passages that were blank and were not scored.
        splits: Number of batches that ran out of memory and made the next batches smaller. Scorers that share
            a loaded model also share this number.
        lost_replicas: Number of devices that failed and are no longer used.

    Example:
        >>> before = scorer.stats()
        >>> ranking = scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."])
        >>> scorer.stats().pairs - before.pairs
        2
    """

    requests: int
    failed: int
    cancelled: int
    pairs: int
    tokens: int
    batches: int
    fill: float
    requests_per_batch: float
    waiting: Percentiles
    compute: Percentiles
    queued_requests: int
    queued_tokens: int
    duplicates: int
    cache_hits: int
    cache_misses: int
    truncations: int
    query_truncations: int
    blank_passages: int
    splits: int
    lost_replicas: int

    @property
    def cache_hit_rate(self) -> float:
        """Share of the passages whose token ids were in the cache, from 0 to 1."""
        return self.cache_hits / max(self.cache_hits + self.cache_misses, 1)

    def to_dict(self) -> dict[str, object]:
        """Return all figures and `cache_hit_rate` as a JSON-serializable dict."""
        return {**asdict(self), "cache_hit_rate": self.cache_hit_rate}


@dataclass(frozen=True)
class ScorerHealth:
    """Whether a scorer accepts requests.

    Attributes:
        state: "ok", "closed" or "device lost". "device lost" means that all devices have failed. Only a new
            process can use them again.
        queued_requests: Number of requests that wait now.
        queued_tokens: Number of tokens that wait now.
        replicas: Number of devices that the model was loaded onto. Each holds a replica, that is, a copy of
            the model.
        replicas_alive: Number of replicas that still work. It is 0 after `close`.

    Example:
        >>> scorer.health().ok
        True
    """

    state: HealthState
    queued_requests: int
    queued_tokens: int
    replicas: int
    replicas_alive: int

    @property
    def ok(self) -> bool:
        """Whether the scorer accepts requests."""
        return self.state == "ok"


class Recorder:
    """Counts events for `ScorerStats`. It has no lock of its own; `MicroBatcher` calls it under its lock."""

    def __init__(self) -> None:
        self.requests = self.failed = self.cancelled = 0
        self.pairs = self.tokens = self.batches = 0
        self.duplicates = self.truncations = self.lost_replicas = 0
        self.query_truncations = self.blank_passages = 0
        self._fill_sum = 0.0
        self._batch_requests = 0
        self._waiting_s: deque[float] = deque(maxlen=_WINDOW)
        self._compute_s: deque[float] = deque(maxlen=_WINDOW)

    def started(self, waited_s: float) -> None:
        """Record that the first sequences of a request were put into a batch."""
        self._waiting_s.append(waited_s)

    def computed(
        self, *, num_requests: int, num_pairs: int, num_tokens: int, budget: int, compute_s: float
    ) -> None:
        """Record a batch that was computed successfully."""
        self.batches += 1
        self.pairs += num_pairs
        self.tokens += num_tokens
        self._batch_requests += num_requests
        # A sequence that is longer than the budget is a batch of its own.
        self._fill_sum += min(num_tokens / budget, 1.0)
        self._compute_s.append(compute_s)

    def stats(
        self, *, queued_requests: int, queued_tokens: int, cache_hits: int, cache_misses: int, splits: int
    ) -> ScorerStats:
        """Return a snapshot. The arguments are the figures that other objects count."""
        batches = max(self.batches, 1)
        return ScorerStats(
            requests=self.requests,
            failed=self.failed,
            cancelled=self.cancelled,
            pairs=self.pairs,
            tokens=self.tokens,
            batches=self.batches,
            fill=self._fill_sum / batches,
            requests_per_batch=self._batch_requests / batches,
            waiting=_percentiles(self._waiting_s),
            compute=_percentiles(self._compute_s),
            queued_requests=queued_requests,
            queued_tokens=queued_tokens,
            duplicates=self.duplicates,
            cache_hits=cache_hits,
            cache_misses=cache_misses,
            truncations=self.truncations,
            query_truncations=self.query_truncations,
            blank_passages=self.blank_passages,
            splits=splits,
            lost_replicas=self.lost_replicas,
        )


def _percentiles(seconds: Iterable[float]) -> Percentiles:
    ordered = sorted(seconds) or [0.0]
    p50, p90, p99 = (1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.9, 0.99))
    return Percentiles(p50_ms=p50, p90_ms=p90, p99_ms=p99)
