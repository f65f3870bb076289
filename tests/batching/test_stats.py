from __future__ import annotations

from typing import Any

import pytest

from bge_rerank_integrations.batching.stats import Recorder, ScorerStats

NO_OTHERS: Any = {"queued_requests": 0, "queued_tokens": 0, "cache_hits": 0, "cache_misses": 0, "splits": 0}


def stats_of(recorder: Recorder, **others: int) -> ScorerStats:
    return recorder.stats(**{**NO_OTHERS, **others})


def computed(recorder: Recorder, **figures: Any) -> None:
    batch: Any = {"num_requests": 1, "num_pairs": 1, "num_tokens": 50, "budget": 100, "compute_s": 0.001}
    recorder.computed(**{**batch, **figures})


def test_before_the_first_batch_all_figures_are_zero() -> None:
    stats = stats_of(Recorder()).to_dict()
    zero = {"p50_ms": 0, "p90_ms": 0, "p99_ms": 0}
    assert (stats.pop("waiting"), stats.pop("compute")) == (zero, zero)
    assert set(stats.values()) == {0}


def test_percentiles_are_in_milliseconds() -> None:
    recorder = Recorder()
    for number in reversed(range(101)):
        recorder.started(number / 1000)
        computed(recorder, compute_s=number / 10)
    waiting, compute = stats_of(recorder).waiting, stats_of(recorder).compute
    assert (waiting.p50_ms, waiting.p90_ms, waiting.p99_ms) == pytest.approx((50, 90, 99))
    assert (compute.p50_ms, compute.p90_ms, compute.p99_ms) == pytest.approx((5000, 9000, 9900))


def test_percentiles_forget_old_values() -> None:
    recorder = Recorder()
    for seconds in [9.0] * 3000 + [0.002] * 2048:
        recorder.started(seconds)
        computed(recorder, compute_s=seconds)
    stats = stats_of(recorder)
    assert stats.waiting.p99_ms == stats.compute.p99_ms == 2
    assert stats.batches == 5048


def test_a_sequence_beyond_the_budget_fills_its_batch() -> None:
    recorder = Recorder()
    computed(recorder, num_tokens=50)
    computed(recorder, num_tokens=1000, num_requests=2)
    assert stats_of(recorder).fill == pytest.approx((0.5 + 1) / 2)
    assert stats_of(recorder).requests_per_batch == 1.5


@pytest.mark.parametrize(("hits", "misses", "rate"), [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 3, 0.25)])
def test_the_hit_rate_of_the_cache(hits: int, misses: int, rate: float) -> None:
    stats = stats_of(Recorder(), cache_hits=hits, cache_misses=misses)
    assert stats.cache_hit_rate == stats.to_dict()["cache_hit_rate"] == rate
