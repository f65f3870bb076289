"""Plots of an evaluation."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from bge_rerank_integrations.errors import DatasetError, missing_extra
from bge_rerank_integrations.evaluation.measures import PER_QUERY, Report

_BETTER, _WORSE, _LINE, _OTHER = "#2a7f62", "#c1443c", "#2b4c7e", "#b3701e"


def check_plot(path: Path) -> None:
    """Verify that a plot can be written to a path, before anything is computed.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DatasetError: The suffix is not a format that matplotlib can write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise missing_extra("eval", "matplotlib") from error
    formats = FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"}  # it needs TeX
    if path.suffix[1:].lower() not in formats:
        raise DatasetError(
            f"the plot cannot be written to {path}: its suffix must be one of {', '.join(sorted(formats))}"
        )


def plot_report(report: Report, path: Path, *, title: str) -> None:
    """Plot the change of each query, and the quality by number of reranked passages.

    Args:
        report: Result of `evaluate`.
        path: Output file. Its suffix (.png, .svg, .pdf) decides the format.
        title: Title of the figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DatasetError: The file cannot be written, or its suffix is not a format that matplotlib can write.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # this canvas needs no display
    figure.suptitle(title, parse_math=False)  # a `$` is no formula
    queries, depths = figure.subplots(1, 2)

    changes = sorted((change.after - change.before for change in report.changes), reverse=True)
    queries.bar(
        range(len(changes)), changes, width=1.0, color=[_BETTER if c > 0 else _WORSE for c in changes]
    )
    queries.axhline(0, color="black", linewidth=0.8)
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    queries.set_title(f"{better} queries better, {worse} worse, {len(changes) - better - worse} unchanged")
    queries.set_xlabel("queries, sorted by change")
    queries.set_ylabel("change in nDCG@10")

    depths.plot(list(report.curve), list(report.curve.values()), marker="o", color=_LINE)
    depths.axhline(report.curve[0], color="grey", linestyle="--", linewidth=1, label="first stage alone")
    if report.compared is not None:
        compared = report.compared
        # matplotlib leaves a label that begins with `_` out of the legend.
        depths.axhline(compared.means[PER_QUERY], color=_OTHER, linestyle=":", label=f" {compared.name}")
    depths.set_title("quality by number of reranked passages")
    depths.set_xlabel("reranked passages for each query")
    depths.set_ylabel("nDCG@10")
    for text in depths.legend(loc="best").get_texts():
        text.set_parse_math(False)
    for axes in (queries, depths):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot = io.BytesIO()  # an error while drawing leaves an older plot as it is
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font has no Chinese characters
        figure.savefig(plot, dpi=150, format=path.suffix[1:].lower())
    try:
        path.write_bytes(plot.getvalue())
    except OSError as error:
        raise DatasetError(f"the plot cannot be written to {path}: {error.strerror}") from error
