"""What a scorer tells of itself: counts and times, never a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final, Literal

# Percentiles are over so many latest requests, or batches.
_WINDOW: Final = 2048

HealthState = Literal["ok", "closed", "device lost"]


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of the latest requests or batches, in milliseconds; zero before the first."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class ScorerStats:
    """What a scorer has done since it was loaded.

    Attributes:
        requests: Requests accepted.
        failed: Of those, ended in an error.
        cancelled: Of those, cancelled or timed out.
        pairs: Sequences scored, windows counted each.
        tokens: Tokens scored.
        batches: Forward passes asked for.
        fill: Mean share of the token budget that a batch used.
        requests_per_batch: Mean number of requests that shared a batch.
        waiting: From acceptance to the first batch, by request.
        compute: In the device, by batch.
        queued_requests: Requests waiting now.
        queued_tokens: Tokens waiting now.
        duplicates: Pairs that were scored with an equal one of the same request.
        cache_hits: Passages whose ids were known from an earlier request.
        cache_misses: Passages that had to be tokenized.
        truncations: Pairs whose passage lost tokens.
        query_truncations: Queries that lost tokens, each counted once per request.
        blank_passages: Passages with nothing to read, which rankings did not score.
        splits: Batches that were out of memory and tried again in parts.
        lost_replicas: Devices that failed for good and were left out.
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
        """Share of the passages whose ids were known; zero before the first."""
        return self.cache_hits / max(self.cache_hits + self.cache_misses, 1)

    def to_dict(self) -> dict[str, object]:
        """Return the figures, and the cache's hit rate, as a dict that JSON can hold."""
        return {**asdict(self), "cache_hit_rate": self.cache_hit_rate}


@dataclass(frozen=True)
class ScorerHealth:
    """Whether a scorer takes requests.

    Attributes:
        state: `ok`, `closed`, or `device lost`: the last device failed and only a new process helps.
        queued_requests: Requests waiting now.
        queued_tokens: Tokens waiting now.
        replicas: Devices that a copy of the model was loaded onto.
        replicas_alive: Of those, not lost; none once the model is released.
    """

    state: HealthState
    queued_requests: int
    queued_tokens: int
    replicas: int
    replicas_alive: int

    @property
    def ok(self) -> bool:
        """Whether requests are taken."""
        return self.state == "ok"


class Recorder:
    """Adds up what happens; whoever owns it holds a lock around each call."""

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
        """Note that a request's first sequences went into a batch."""
        self._waiting_s.append(waited_s)

    def computed(
        self, *, num_requests: int, num_pairs: int, num_tokens: int, budget: int, compute_s: float
    ) -> None:
        """Note a batch that gave scores."""
        self.batches += 1
        self.pairs += num_pairs
        self.tokens += num_tokens
        self._batch_requests += num_requests
        self._fill_sum += num_tokens / budget
        self._compute_s.append(compute_s)

    def stats(
        self, *, queued_requests: int, queued_tokens: int, cache_hits: int, cache_misses: int, splits: int
    ) -> ScorerStats:
        """Return a snapshot, with the counts that others keep."""
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
