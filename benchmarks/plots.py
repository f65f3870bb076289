"""Plots of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.registry import is_ours
from bge_rerank_integrations.errors import missing_extra

_OURS, _THEIRS = "#2a7f62", "#9aa5b1"


def check_plots() -> None:
    """Raise `MissingExtraError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("bench", "matplotlib") from error


def plot_speed(report: Mapping[str, Any], path: Path) -> None:
    """Plot the throughput of each contender on each workload of a `speed` report."""
    workloads = report["workloads"]
    height = 0.8 + 0.32 * max(len(workload["results"]) for workload in workloads)
    figure = _figure(10, height * len(workloads), report)
    for axes, workload in zip(
        figure.subplots(len(workloads), 1, squeeze=False)[:, 0], workloads, strict=True
    ):
        results = sorted(workload["results"], key=lambda result: result["tokens_per_s"])
        bars = axes.barh(
            [f"{result['name']}, {result['dtype']}" for result in results],
            [result["tokens_per_s"] for result in results],
            color=[_OURS if is_ours(result["key"]) else _THEIRS for result in results],
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_title(f"{workload['name']}: {workload['title']}; {workload['num_pairs']} pairs", fontsize=10)
        axes.set_xlabel("tokens per second")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_length(report: Mapping[str, Any], path: Path) -> None:
    """Plot throughput by length of the pairs for a `length` report."""
    figure = _figure(9, 5, report)
    axes = figure.subplots()
    series: dict[str, list[tuple[int, float]]] = {}
    names: dict[str, str] = {}
    for workload in report["workloads"]:
        for result in workload["results"]:
            names[result["key"]] = f"{result['name']}, {result['dtype']}"
            series.setdefault(result["key"], []).append((workload["length"], result["tokens_per_s"]))
    for key, points in series.items():
        lengths, throughputs = zip(*points, strict=True)
        axes.plot(lengths, throughputs, "o-" if is_ours(key) else "s--", label=names[key])
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [workload["length"] for workload in report["workloads"]],
        [f"{workload['length']}" for workload in report["workloads"]],
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per pair")
    axes.set_ylabel("tokens per second")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float, report: Mapping[str, Any]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # this canvas needs no display
    hardware = report["hardware"]
    figure.suptitle(f"{report['settings']['model']}; {hardware.get('gpu', hardware['cpu'])}", fontsize=10)
    return figure
