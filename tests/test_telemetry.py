from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.telemetry import observe_with_opentelemetry, prometheus_collector


def test_prometheus(checkpoint: Path) -> None:
    registry = CollectorRegistry()
    labels = {"model": str(checkpoint)}
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        registry.register(prometheus_collector(scorer))
        scorer.score([("canary", "canary"), ("canary", "other canary")])
        assert registry.get_sample_value("bge_rerank_up", labels) == 1
        assert registry.get_sample_value("bge_rerank_requests_total", labels) == 1
        assert registry.get_sample_value("bge_rerank_pairs_total", labels) == 2
        assert registry.get_sample_value("bge_rerank_queued_tokens", labels) == 0
        assert registry.get_sample_value("bge_rerank_lost_replicas_total", labels) == 0
        scorer.score([("canary", "canary"), ("canary", "third canary")])
        assert registry.get_sample_value("bge_rerank_cache_hits_total", labels) == 1
        assert registry.get_sample_value("bge_rerank_cache_misses_total", labels) == 3
        assert registry.get_sample_value("bge_rerank_cache_hit_rate", labels) == 0.25
        assert (registry.get_sample_value("bge_rerank_compute_p50_ms", labels) or 0) > 0
        scorer.rank("canary " * 1000, ["canary", "", " "])
        assert registry.get_sample_value("bge_rerank_query_truncations_total", labels) == 1
        assert registry.get_sample_value("bge_rerank_blank_passages_total", labels) == 2
        assert registry.get_sample_value("bge_rerank_truncations_total", labels) == 0
        assert b"canary" not in generate_latest(registry)
    assert registry.get_sample_value("bge_rerank_up", labels) == 0
    assert registry.get_sample_value("bge_rerank_requests_total", labels) is None


def test_opentelemetry(checkpoint: Path) -> None:
    reader = InMemoryMetricReader()
    counters: set[str] = set()
    meter = MeterProvider([reader]).get_meter("test")

    def read() -> dict[str, float]:
        data = reader.get_metrics_data()
        assert data is not None
        metrics = data.resource_metrics[0].scope_metrics[0].metrics
        counters.update(metric.name for metric in metrics if getattr(metric.data, "is_monotonic", False))
        points: dict[str, list[Any]] = {metric.name: list(metric.data.data_points) for metric in metrics}
        assert all(point.attributes == {"model": str(checkpoint)} for (point,) in points.values())
        return {name: point.value for name, (point,) in points.items()}

    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        observe_with_opentelemetry(scorer, meter)
        scorer.score([("a", "b"), ("a", "b")])
        values = read()
        assert (values["bge_rerank.up"], values["bge_rerank.requests"]) == (1, 1)
        assert (values["bge_rerank.pairs"], values["bge_rerank.duplicates"]) == (1, 1)
        assert (values["bge_rerank.cache_misses"], values["bge_rerank.cache_hit_rate"]) == (1, 0)
        assert (values["bge_rerank.query_truncations"], values["bge_rerank.blank_passages"]) == (0, 0)
    assert read() == {"bge_rerank.up": 0}
    assert {"bge_rerank.requests", "bge_rerank.pairs", "bge_rerank.cache_misses"} <= counters
    assert not {"bge_rerank.up", "bge_rerank.queued_tokens", "bge_rerank.cache_hit_rate"} & counters


@pytest.mark.parametrize(
    ("call", "library", "extra"),
    [
        ("prometheus_collector(None)", "prometheus_client.core", "prometheus"),
        ("observe_with_opentelemetry(None, None)", "opentelemetry.metrics", "opentelemetry"),
    ],
)
def test_a_missing_library_is_named_with_its_command(call: str, library: str, extra: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None\nfrom bge_rerank_integrations.telemetry import *\n{call}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f'pip install "bge-rerank-integrations[{extra}]"' in run.stderr
