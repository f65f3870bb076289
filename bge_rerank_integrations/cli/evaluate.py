"""`bge-rerank eval`: ranking quality on a BEIR folder, before and after reranking."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import click

from bge_rerank_integrations.cli.console import WIDTH, cut, require_stdout, wrap
from bge_rerank_integrations.cli.options import (
    EXISTING_FILE,
    EXISTING_FOLDER,
    config_options,
    json_option,
    output_option,
    quiet_option,
    shows_progress,
)
from bge_rerank_integrations.cli.summary import describe_precision_used, describe_truncation
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import DatasetError
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import BeirDataset, Run, read_beir, read_run
from bge_rerank_integrations.evaluation.measures import Change, Interval, Report, evaluate
from bge_rerank_integrations.evaluation.plots import check_plot, plot_report
from bge_rerank_integrations.scorer import Scorer

_NUM_SHOWN = 5
_MAX_DEPTH = 1_000_000
_MAX_NAME_COLUMNS = 20


@click.command("eval")
@click.argument("folder", type=EXISTING_FOLDER)
@click.option(
    "--run",
    type=EXISTING_FILE,
    metavar="RUN",
    help="TREC run of the first stage.  [default: BM25 over the folder's corpus]",
)
@click.option(
    "--compare",
    type=EXISTING_FILE,
    metavar="RUN",
    help="TREC run of another reranker to compare with, such as `rerank-run` writes.",
)
@click.option("--split", default="test", show_default=True, help="Use the judgements in qrels/SPLIT.tsv.")
@click.option("--strict", is_flag=True, help="Fail if a passage is judged twice for a query.")
@click.option(
    "--depth",
    type=click.IntRange(min=1, max=_MAX_DEPTH),
    default=50,
    show_default=True,
    help="Passages to rerank per query.",
)
@output_option("--plot", text="Plot the change of each query and the quality by depth.")
@json_option
@quiet_option
@config_options()
def evaluate_command(
    config: ScorerConfig,
    folder: Path,
    run: Path | None,
    compare: Path | None,
    split: str,
    strict: bool,
    depth: int,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure ranking quality before and after reranking.

    FOLDER is a BEIR folder with corpus.jsonl, queries.jsonl and qrels/test.tsv. The
    command prints nDCG@10, MRR@10, MAP and recall before and after reranking, the
    change with its 95 % confidence interval (paired bootstrap over the queries), and
    the queries that gained and lost most.

    --compare also prints the measures of another reranker's run. For each measure, it
    prints the model's value as a share of the other one, and the difference with its
    95 % confidence interval. The run must contain all passages that are reranked
    here. Its other passages are ignored.

    If a passage is judged more than once for a query, the highest grade counts.

    \b
    bge-rerank eval scifact/ --model embedded
    bge-rerank eval scifact/ --run dense.trec --depth 100 --plot scifact.png
    bge-rerank eval scifact/ --model embedded --compare other-reranker.trec
    """
    require_stdout()
    if plot is not None:
        check_plot(plot)
    dataset = read_beir(folder, split, strict=strict)
    if dataset.num_repeated:
        repeated = (
            f"{dataset.num_repeated} judgement(s) repeat an earlier one, {dataset.num_conflicting} with a "
            "different grade. The highest grade counts."
        )
        click.echo(wrap(repeated), err=True)
    if num_unknown := len(dataset.qrels.keys() - dataset.queries.keys()):
        unknown = f"Judged queries without a text in queries.jsonl: {num_unknown}. They are left out."
        click.echo(wrap(unknown), err=True)
    if num_missing := dataset.num_unknown_passages():
        missing = (
            f"Relevant passages that are not in corpus.jsonl: {num_missing} of {dataset.num_relevant()}. "
            "They count as not found."
        )
        click.echo(wrap(missing), err=True)
    # nDCG@10 and MRR@10 need ten passages, even if fewer are reranked.
    first = _search(dataset, max(depth, 10)) if run is None else read_run(run)
    compared = None if compare is None else (compare.stem, read_run(compare))
    with Scorer.from_config(config) as scorer:
        report = evaluate(scorer, dataset, first, depth, compared=compared, progress=shows_progress(quiet))
    try:
        if plot is not None:
            plot_report(report, plot, title=cut(f"{folder.resolve().name}, {config.model}", WIDTH))
    finally:  # print the numbers even if the plot could not be written
        if as_json:
            source = {"folder": str(folder), "split": split, "run": None if run is None else str(run)}
            click.echo(json.dumps({**source, **_record(report, config)}))
        else:
            stage = f"{'BM25' if run is None else run.name}, top {depth}"
            for line in _table(report, dataset, stage, config):
                click.echo(line)


def _search(dataset: BeirDataset, depth: int) -> Run:
    """Return what BM25 finds for the judged queries."""
    found = Bm25(dataset.corpus).search(dataset.judged_queries(), depth)
    if not any(found.values()):
        raise DatasetError(
            "BM25 finds nothing, because no passage shares a word with a judged query; give the run of "
            "another first stage with --run"
        )
    return found


def _record(report: Report, config: ScorerConfig) -> dict[str, object]:
    """Return the report as a JSON object."""
    from bge_rerank_integrations.engine.describe import describe_precision

    precision = describe_precision(config)
    record = {
        "model": config.model,
        "device": precision.device,
        "dtype": precision.dtype,
        **dataclasses.asdict(report),
    }
    record["intervals"] = _plain(report.intervals)
    if report.compared is not None:
        record["compared"] = {**record["compared"], "intervals": _plain(report.compared.intervals)}
    record["changes"] = [change._asdict() for change in report.changes]
    return record


def _table(report: Report, dataset: BeirDataset, stage: str, config: ScorerConfig) -> Iterator[str]:
    """Yield the lines of the printed report."""
    yield wrap(
        f"First stage: {stage}; {len(report.changes)} queries, {report.num_pairs} pairs; {config.model}"
    )
    yield ""
    if report.num_unanswered:
        yield f"Queries without a passage to rerank: {report.num_unanswered}. They count as 0."
        yield ""
    other = report.compared
    name = "" if other is None else cut(other.name, _MAX_NAME_COLUMNS)
    width = 0 if other is None else max(len(name) + 2, 9)
    yield f"{'':10}{'before':>9}{name:>{width}}{'after':>9}{'change':>9}   95 % interval"
    for measure, interval in report.intervals.items():
        before, after = report.before[measure], report.after[measure]
        between = "" if other is None else f"{other.means[measure]:{width}.4f}"
        yield f"{measure:10}{before:9.4f}{between}{after:9.4f}{_format(interval)}"
    if other is not None:
        yield ""
        yield f"After reranking, compared with {cut(other.name, WIDTH - 40)}:"
        yield f"{'':10}{'share':>9}{'difference':>12}   95 % interval"
        for measure, interval in other.intervals.items():
            share = other.shares[measure]
            shown = "-" if share is None else f"{share:.1%}"
            yield f"{measure:10}{shown:>9}   {_format(interval)}"
    better = sum(change.after > change.before for change in report.changes)
    worse = sum(change.after < change.before for change in report.changes)
    same = len(report.changes) - better - worse
    yield ""
    yield f"nDCG@10 per query: {better} better, {worse} worse, {same} unchanged"
    yield from _changes("Largest gains in nDCG@10", report.helped(_NUM_SHOWN), dataset)
    yield from _changes("Largest losses in nDCG@10", report.hurt(_NUM_SHOWN), dataset)
    yield ""
    if cut_off := describe_truncation(report.num_truncated, report.num_truncated_queries, config):
        yield wrap(cut_off)
    yield (
        f"{report.seconds:.1f} s: {report.num_pairs / report.seconds:.0f} pairs/s, "
        f"{report.num_tokens / report.seconds:.0f} tokens/s"
    )
    yield wrap(describe_precision_used(config))


def _changes(title: str, changes: list[Change], dataset: BeirDataset) -> Iterator[str]:
    if changes:
        yield ""
        yield f"{title}:"
    for change in changes:
        line = f"  {change.before:.3f} to {change.after:.3f}  {cut(change.query_id, _MAX_NAME_COLUMNS)}: "
        yield line + cut(dataset.queries[change.query_id], WIDTH - len(line))


def _format(interval: Interval) -> str:
    return f"{interval.mean:+9.4f}   {interval.low:+.4f} to {interval.high:+.4f}"


def _plain(intervals: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval._asdict() for name, interval in intervals.items()}
