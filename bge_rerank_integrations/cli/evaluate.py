"""`bge-rerank eval`: ranking quality on a BEIR folder, before and after."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from bge_rerank_integrations.bm25 import Bm25
from bge_rerank_integrations.cli.options import (
    EXISTING_FILE,
    EXISTING_FOLDER,
    config_options,
    json_option,
    output_option,
    quiet_option,
    shows_progress,
)
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.datasets import BeirDataset, read_beir, read_run
from bge_rerank_integrations.evaluation import Change, Interval, Report, evaluate
from bge_rerank_integrations.plots import check_plot, plot_report
from bge_rerank_integrations.scorer import Scorer

_NUM_SHOWN = 5
_MAX_CHARACTERS = 70


@click.command("eval")
@click.argument("folder", type=EXISTING_FOLDER)
@click.option(
    "--run",
    type=EXISTING_FILE,
    metavar="RUN",
    help="First stage: a TREC run.  [default: BM25 over the folder's corpus]",
)
@click.option(
    "--compare",
    type=EXISTING_FILE,
    metavar="RUN",
    help="Another reranker of the same passages, to set beside the model: a TREC run, such as `rerank-run` "
    "writes.",
)
@click.option("--split", default="test", show_default=True, help="Which qrels/SPLIT.tsv to judge by.")
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Passages of each query to rerank.",
)
@output_option("--plot", text="Draw what happened to each query, and quality by depth.")
@json_option
@quiet_option
@config_options()
def evaluate_command(
    config: ScorerConfig,
    folder: Path,
    run: Path | None,
    compare: Path | None,
    split: str,
    depth: int,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure ranking quality, before and after.

    FOLDER is a BEIR folder: corpus.jsonl, queries.jsonl and qrels/test.tsv. Prints nDCG@10, MRR@10, MAP
    and recall of the first stage and after reranking, with the 95 % interval of a paired bootstrap over
    the queries, and the queries that gained and lost most.

    --compare puts another reranker's run beside it: what it measures, the share of that which the model
    reaches, and the interval of the difference. It must rank all passages that are reranked here; what
    it ranks beyond them does not count.

    \b
    bge-rerank eval scifact/ --model embedded
    bge-rerank eval scifact/ --run dense.trec --depth 100 --plot scifact.png --json
    bge-rerank eval scifact/ --model embedded --compare other-reranker.trec
    """
    if plot is not None:
        check_plot(plot)
    dataset = read_beir(folder, split)
    first = Bm25(dataset.corpus).search(dataset.judged_queries(), depth) if run is None else read_run(run)
    compared = None if compare is None else (compare.stem, read_run(compare))
    with Scorer.from_config(config) as scorer:
        report = evaluate(scorer, dataset, first, depth, compared=compared, progress=shows_progress(quiet))
    if as_json:
        record = {"model": config.model, "folder": str(folder), **dataclasses.asdict(report)}
        record["intervals"] = _plain(report.intervals)
        if report.compared is not None:
            record["compared"]["intervals"] = _plain(report.compared.intervals)
        record["changes"] = [change._asdict() for change in report.changes]
        click.echo(json.dumps(record))
    else:
        _print(report, dataset, f"{'BM25' if run is None else run.name}, top {depth}", config.model)
    if plot is not None:  # last, so that nothing is lost if it cannot be written
        plot_report(report, plot, title=f"{folder.resolve().name}, {config.model}")


def _print(report: Report, dataset: BeirDataset, first: str, model: str) -> None:
    click.echo(f"First stage: {first}; {len(report.changes)} queries, {report.num_pairs} pairs; {model}\n")
    if report.num_unanswered:
        click.echo(f"{report.num_unanswered} queries have no passage to rerank and count as 0.\n")
    other = report.compared
    width = 0 if other is None else max(len(other.name) + 2, 9)
    between = "" if other is None else f"{other.name:>{width}}"
    click.echo(f"{'':10}{'before':>9}{between}{'after':>9}{'change':>9}   95 % interval")
    for name, interval in report.intervals.items():
        between = "" if other is None else f"{other.means[name]:{width}.4f}"
        click.echo(
            f"{name:10}{report.before[name]:9.4f}{between}{report.after[name]:9.4f}{_format(interval)}"
        )
    if other is not None:
        click.echo(f"\nAfter, against {other.name}:")
        click.echo(f"{'':10}{'share':>9}{'difference':>12}   95 % interval")
        for name, interval in other.intervals.items():
            share = other.shares[name]
            shown = "-" if share is None else f"{share:.1%}"
            click.echo(f"{name:10}{shown:>9}   {_format(interval)}")
    better = sum(change.after > change.before for change in report.changes)
    worse = sum(change.after < change.before for change in report.changes)
    same = len(report.changes) - better - worse
    click.echo(f"\nnDCG@10 of single queries: {better} better, {worse} worse, {same} the same")
    _print_changes("Helped most", report.helped(_NUM_SHOWN), dataset)
    _print_changes("Hurt most", report.hurt(_NUM_SHOWN), dataset)
    click.echo(
        f"\n{report.seconds:.1f} s: {report.num_pairs / report.seconds:.0f} pairs/s, "
        f"{report.num_tokens / report.seconds:.0f} tokens/s"
    )


def _format(interval: Interval) -> str:
    return f"{interval.mean:+9.4f}   {interval.low:+.4f} to {interval.high:+.4f}"


def _plain(intervals: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval._asdict() for name, interval in intervals.items()}


def _print_changes(title: str, changes: list[Change], dataset: BeirDataset) -> None:
    if changes:
        click.echo(f"\n{title}:")
    for change in changes:
        text = " ".join(dataset.queries[change.query_id].split())
        shown = text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
        click.echo(f"  {change.before:.3f} to {change.after:.3f}  {change.query_id}: {shown}")
