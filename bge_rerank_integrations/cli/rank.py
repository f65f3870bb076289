"""`bge-rerank rank` and `bge-rerank rerank-run`: files in, files out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click
from tqdm import tqdm

from bge_rerank_integrations import __version__
from bge_rerank_integrations.cli.options import (
    EXISTING_FILE,
    EXISTING_FOLDER,
    config_options,
    output_option,
    quiet_option,
    shows_progress,
)
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.datasets import format_run, read_corpus, read_queries, read_run
from bge_rerank_integrations.jobs import MalformedLineError, Progress, RankJob, rank_lines
from bge_rerank_integrations.ranking import check_threshold, check_top_n
from bge_rerank_integrations.reranking import rerank_run
from bge_rerank_integrations.scorer import Scorer

# Where the model is kept, how many copies of it run and how requests wait: a job may be gone on with even
# if these change.
_NOT_DECISIVE = ("cache_folder", "local_files_only", "devices", "max_wait_ms", "max_queued_tokens")


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, allow_dash=True), default="-")
@output_option("-o", "--output", text="Where to; without it, stdout.")
@click.option("--top-n", type=click.IntRange(min=0), help="Most passages to give for a request.")
@click.option("--threshold", type=float, help="Least score to give.")
@click.option("--normalize", is_flag=True, help="Scores from 0 to 1 instead of raw logits.")
@click.option("--strict", is_flag=True, help="Stop at the first malformed line, with exit status 3.")
@click.option("--overwrite", is_flag=True, help="Begin again, whatever OUTPUT holds.")
@quiet_option
@config_options()
def rank(
    config: ScorerConfig,
    source: str,
    output: Path | None,
    top_n: int | None,
    threshold: float | None,
    normalize: bool,
    strict: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Rank a file of requests.

    SOURCE is JSONL; `-`, the default, is stdin. A request is `{"query": "...", "passages": ["..."]}`;
    with an `id` of its own, and passages as `{"id": ..., "text": "..."}`, the ids come back. For each,
    one line is given, in the same order:
    `{"line": 1, "id": ..., "results": [{"index": 3, "id": ..., "score": 4.2}, ...]}`, best first.

    Malformed lines are named on stderr by their number and left out. Memory does not grow with the file.

    A job that was killed goes on where it stopped when the same command is given again, without
    --overwrite, if SOURCE is a file: rows are in OUTPUT.partial until all of them are there, OUTPUT.job.json
    tells what the job is, and OUTPUT.lock keeps a second process out.

    \b
    bge-rerank rank requests.jsonl -o ranked.jsonl --top-n 10
    bge-rerank rank --model embedded < requests.jsonl | jq .results[0]
    """
    config = ScorerConfig.from_dict({**config.to_dict(), "normalize": normalize})
    check_top_n(top_n)
    check_threshold(threshold, normalize=normalize)
    # A pipe can be read once only, as stdin can.
    input_path = Path(source) if source != "-" and Path(source).is_file() else None
    with ExitStack() as stack:
        scorer = stack.enter_context(Scorer.from_config(config))
        skip: int | None = 0
        job = None
        if output is not None:
            settings = {**_decisive(config), "top_n": top_n, "threshold": threshold}
            job = stack.enter_context(RankJob(output, settings, input_path, overwrite=overwrite))
            skip = job.begin()
        if skip is None:
            click.echo(f"{output} is complete already.", err=True)
            return
        if skip:
            click.echo(f"Going on after line {skip}.", err=True)
        lines: IO[bytes] = stack.enter_context(click.open_file(source, "rb"))
        progress = stack.enter_context(_progress(show=shows_progress(quiet)))
        rows = rank_lines(
            scorer,
            lines,
            top_n=top_n,
            threshold=threshold,
            strict=strict,
            skip=skip,
            on_malformed=_report,
            progress=progress,
        )
        if job is not None:
            try:
                job.write(rows)
            except KeyboardInterrupt:
                if input_path is not None:
                    click.echo("Stopped. The same command goes on from here.", err=True)
                raise
        else:
            for batch in rows:
                click.echo("".join(batch), nl=False)
    left_out = f"; {progress.malformed} malformed line(s) left out" if progress.malformed else ""
    click.echo(f"{progress.rows} request(s), {progress.pairs} pair(s) ranked{left_out}.", err=True)


@click.command("rerank-run")
@click.argument("run", type=EXISTING_FILE)
@click.argument("folder", type=EXISTING_FOLDER)
@output_option("-o", "--output", text="Where to; without it, stdout.")
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Passages of each query to rerank; those beyond are left out.",
)
@click.option("--tag", default="bge-rerank", show_default=True, help="Last column of the run.")
@quiet_option
@config_options()
def rerank_run_command(
    config: ScorerConfig,
    run: Path,
    folder: Path,
    output: Path | None,
    depth: int,
    tag: str,
    quiet: bool,
) -> None:
    """Rerank a TREC run.

    RUN and a BEIR FOLDER (corpus.jsonl, queries.jsonl) in, a TREC run out.

    \b
    bge-rerank rerank-run bm25.trec scifact/ -o reranked.trec
    trec_eval -m ndcg_cut.10 qrels.trec reranked.trec
    """
    if not tag or len(tag.split()) != 1:
        raise click.UsageError("--tag must be one word")
    inputs = [run, folder / "corpus.jsonl", folder / "queries.jsonl"]
    if output is not None and output.resolve() in [path.resolve() for path in inputs]:
        raise click.UsageError(f"{output} is an input; give the output another name")
    first = {query_id: dict(list(scores.items())[:depth]) for query_id, scores in read_run(run).items()}
    corpus, queries = read_corpus(folder), read_queries(folder)
    with Scorer.from_config(config) as scorer:
        reranked = rerank_run(scorer, queries, corpus, first, progress=shows_progress(quiet))
    if output is None:
        for line in format_run(reranked, tag):
            click.echo(line, nl=False)
        return
    temporary = output.with_name(output.name + ".partial")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(format_run(reranked, tag))
    temporary.replace(output)


def _decisive(config: ScorerConfig) -> dict[str, Any]:
    """Return what decides a job's scores, the choices that were left to the machine made."""
    from bge_rerank_integrations.engine.describe import describe_checkpoint, describe_machine

    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_DECISIVE}
    machine = describe_machine(config)
    return {
        **settings,
        "version": __version__,
        "device": machine.device.partition(":")[0],
        "dtype": machine.dtype,
        "checkpoint": describe_checkpoint(config).fingerprint,
    }


def _report(error: MalformedLineError) -> None:
    tqdm.write(f"{error}; left out", file=sys.stderr)


@contextmanager
def _progress(*, show: bool) -> Iterator[Progress]:
    with tqdm(unit="pair", disable=not show) as bar:
        yield Progress(on_change=lambda progress: bar.update(progress.pairs - bar.n))
