"""Exports the statistics of a scorer to Prometheus and OpenTelemetry, with their own client libraries.

Both call `Scorer.stats()` and `Scorer.health()` when metrics are collected. Scoring itself does no extra
work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from bge_rerank_integrations.batching.stats import ScorerStats
from bge_rerank_integrations.errors import ScorerClosedError, missing_extra
from bge_rerank_integrations.scorer import Scorer

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.trace import Span
    from prometheus_client.registry import Collector


class _Metric(NamedTuple):
    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    description: str
    read: Callable[[ScorerStats], float]


_METRICS: Final = (
    _Metric("requests", "counter", "{request}", "Accepted requests.", lambda s: s.requests),
    _Metric("failed", "counter", "{request}", "Requests that ended with an exception.", lambda s: s.failed),
    _Metric(
        "cancellations",
        "counter",
        "{request}",
        "Requests that were cancelled or timed out.",
        lambda s: s.cancelled,
    ),
    _Metric("pairs", "counter", "{pair}", "Scored sequences.", lambda s: s.pairs),
    _Metric("tokens", "counter", "{token}", "Scored tokens.", lambda s: s.tokens),
    _Metric("batches", "counter", "{batch}", "Batches.", lambda s: s.batches),
    _Metric(
        "duplicates",
        "counter",
        "{pair}",
        "Pairs that shared the score of an equal pair.",
        lambda s: s.duplicates,
    ),
    _Metric(
        "cache_hits", "counter", "{passage}", "Passages found in the token cache.", lambda s: s.cache_hits
    ),
    _Metric(
        "cache_misses", "counter", "{passage}", "Passages that were tokenized.", lambda s: s.cache_misses
    ),
    _Metric("truncations", "counter", "{pair}", "Pairs whose passage lost tokens.", lambda s: s.truncations),
    _Metric(
        "query_truncations", "counter", "{query}", "Queries that lost tokens.", lambda s: s.query_truncations
    ),
    _Metric("blank_passages", "counter", "{passage}", "Blank passages.", lambda s: s.blank_passages),
    _Metric(
        "splits",
        "counter",
        "{batch}",
        "Batches that ran out of memory and made the next ones smaller.",
        lambda s: s.splits,
    ),
    _Metric(
        "lost_replicas", "counter", "{device}", "Devices that failed permanently.", lambda s: s.lost_replicas
    ),
    _Metric("queued_requests", "gauge", "{request}", "Requests that wait.", lambda s: s.queued_requests),
    _Metric("queued_tokens", "gauge", "{token}", "Tokens that wait.", lambda s: s.queued_tokens),
    _Metric(
        "cache_hit_rate",
        "gauge",
        "1",
        "Share of passages found in the token cache.",
        lambda s: s.cache_hit_rate,
    ),
    _Metric(
        "batch_fill", "gauge", "1", "Mean share of the token budget that a batch used.", lambda s: s.fill
    ),
    _Metric(
        "waiting_p50",
        "gauge",
        "ms",
        "Median time from acceptance to first batch.",
        lambda s: s.waiting.p50_ms,
    ),
    _Metric(
        "waiting_p99",
        "gauge",
        "ms",
        "99th percentile of the time to the first batch.",
        lambda s: s.waiting.p99_ms,
    ),
    _Metric("compute_p50", "gauge", "ms", "Median compute time of a batch.", lambda s: s.compute.p50_ms),
    _Metric(
        "compute_p99",
        "gauge",
        "ms",
        "99th percentile of the compute time of a batch.",
        lambda s: s.compute.p99_ms,
    ),
)


def prometheus_collector(scorer: Scorer, *, model_name: str | None = None) -> Collector:
    """Return a Prometheus collector for a scorer. Its metrics are named `bge_rerank_*`.

    Every metric has a label `model`. For a closed scorer, the only metric is `bge_rerank_up` with the value
    0.

    Args:
        scorer: The scorer to observe.
        model_name: Value of the label `model`. None uses the option `model`, which may be the path of a
            folder.

    Returns:
        A collector, to be registered in a registry of prometheus-client.

    Raises:
        MissingExtraError: prometheus-client is not installed.

    Example:
        >>> prometheus_client.REGISTRY.register(prometheus_collector(scorer))
    """
    try:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise missing_extra("prometheus", "prometheus-client") from error

    label = scorer.config.model if model_name is None else model_name

    class ScorerCollector(Collector):
        def collect(self) -> Iterable[Metric]:
            up = GaugeMetricFamily("bge_rerank_up", "Whether the scorer accepts requests.", labels=["model"])
            up.add_metric([label], float(scorer.health().ok))
            yield up
            stats = _read(scorer)
            if stats is None:
                return
            for metric in _METRICS:
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                name = f"bge_rerank_{metric.name}" + ("_ms" if metric.unit == "ms" else "")
                family = make(name, metric.description, labels=["model"])
                family.add_metric([label], metric.read(stats))
                yield family

    return ScorerCollector()


def prometheus_exposition(scorer: Scorer | None, *, model_name: str | None = None) -> tuple[bytes, str]:
    """Return the metrics of a scorer in the text format of Prometheus.

    Args:
        scorer: The scorer. None gives no metrics.
        model_name: As in `prometheus_collector`.

    Returns:
        The text and its content type.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    except ImportError as error:
        raise missing_extra("prometheus", "prometheus-client") from error

    registry = CollectorRegistry(auto_describe=False)
    if scorer is not None:
        registry.register(prometheus_collector(scorer, model_name=model_name))
    return generate_latest(registry), CONTENT_TYPE_LATEST


@contextmanager
def request_span(name: str, headers: Mapping[str, str]) -> Iterator[Callable[[str, int | str], None]]:
    """Trace a request of the server as an OpenTelemetry span. Do nothing if OpenTelemetry is not installed.

    Args:
        name: Name of the span.
        headers: Headers of the request, with lower-case names. They may identify the parent span.

    Yields:
        A function that sets an attribute of the span.
    """
    with _start_span(name, headers) as span:
        yield (lambda _, __: None) if span is None else span.set_attribute


def _start_span(name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span | None]:
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return nullcontext()
    tracer = trace.get_tracer("bge_rerank_integrations.server")
    # Exceptions are not recorded, because their messages may contain a text.
    return tracer.start_as_current_span(
        name,
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        record_exception=False,
        set_status_on_exception=False,
    )


def observe_with_opentelemetry(scorer: Scorer, meter: Meter) -> None:
    """Create OpenTelemetry instruments for a scorer. They are named `bge_rerank.*`.

    Every observation has an attribute `model`. For a closed scorer, only `bge_rerank.up` is observed.

    Args:
        scorer: The scorer to observe.
        meter: A meter of the application's meter provider.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.

    Example:
        >>> observe_with_opentelemetry(scorer, opentelemetry.metrics.get_meter("my-service"))
    """
    try:
        from opentelemetry.metrics import Observation
    except ImportError as error:
        raise missing_extra("opentelemetry", "opentelemetry-api") from error

    attributes = {"model": scorer.config.model}

    def observing(
        read: Callable[[ScorerStats], float],
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            stats = _read(scorer)
            return [] if stats is None else [Observation(read(stats), attributes)]

        return observe

    def observe_up(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(int(scorer.health().ok), attributes)]

    meter.create_observable_gauge("bge_rerank.up", [observe_up], "1", "Whether the scorer accepts requests.")
    for metric in _METRICS:
        create = (
            meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
        )
        create(f"bge_rerank.{metric.name}", [observing(metric.read)], metric.unit, metric.description)


def _read(scorer: Scorer) -> ScorerStats | None:
    try:
        return scorer.stats()
    except ScorerClosedError:
        return None
