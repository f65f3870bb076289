"""`bge-rerank rank` ranks the requests in a file, or in a folder on a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click
from tqdm import tqdm

from bge_rerank_integrations.cli.console import require_stdout, wrap
from bge_rerank_integrations.cli.jobs.file_job import FileJob
from bge_rerank_integrations.cli.jobs.rank_lines import Progress, rank_lines
from bge_rerank_integrations.cli.jobs.requests import MalformedLineError, check_format
from bge_rerank_integrations.cli.jobs.score_settings import settings_of_scores
from bge_rerank_integrations.cli.options import (
    config_options,
    name_options,
    output_option,
    quiet_option,
    shows_progress,
)
from bge_rerank_integrations.cli.rank_on_ray import rank_on_ray
from bge_rerank_integrations.cli.ray_options import RankCommand, RayOptions, ray_options
from bge_rerank_integrations.cli.summary import print_summary
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.checkpoint.locate import pin_checkpoint
from bge_rerank_integrations.ranking import check_threshold, check_top_n
from bge_rerank_integrations.scorer import Scorer

# Most malformed lines that are reported one by one. Further malformed lines are only counted.
_MAX_NAMED_LINES = 20


@click.command(cls=RankCommand)
@click.argument("source", type=click.Path(exists=True, allow_dash=True), default="-")
@output_option("-o", "--output", text="Output file.  [default: stdout]", may_be_folder=True)
@click.option("--top-n", type=click.IntRange(min=0), help="Maximum number of passages to return per request.")
@click.option("--threshold", type=float, help="Return only passages with at least this score.")
@click.option("--normalize", is_flag=True, help="Return scores from 0 to 1 instead of raw logits.")
@click.option("--return-texts", is_flag=True, help="Return each passage's text with its score.")
@click.option("--strict", is_flag=True, help="Stop at the first malformed line with exit status 3.")
@click.option("--overwrite", is_flag=True, help="Start from the first line and replace the output file.")
@quiet_option
@ray_options
@config_options()
def rank(
    config: ScorerConfig,
    source: str,
    output: Path | None,
    on_ray: RayOptions | None,
    top_n: int | None,
    threshold: float | None,
    normalize: bool,
    return_texts: bool,
    strict: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Rank the passages of each request in a file.

    SOURCE is a JSONL file in UTF-8, or `-` for stdin (the default). Each line is a
    request:

    \b
    {"query": "...", "passages": ["...", "..."]}

    The list can also be called `documents` or `texts`. A passage is a string or an
    object such as {"id": 7, "title": "...", "text": "..."}. If a passage has a
    title, the model scores the title, a space and the text. `_id` is read as `id`,
    so a line of a BEIR corpus is a valid passage.

    Each request produces one output line, in the order of SOURCE. It contains the
    request's `id` and, best first, the index, `id` and score of each passage:

    \b
    {"line": 1, "id": ..., "results": [{"index": 3, "id": ..., "score": 4.2}]}

    A malformed line is reported on stderr with its line number and skipped. If no
    line is a request, the exit status is 3. Memory use does not grow with the file.

    With -o OUTPUT and a file as SOURCE, an interrupted job can be resumed: run the
    same command again, without --overwrite. OUTPUT.partial holds the rows until the
    job is complete, OUTPUT.job.json records its settings, and OUTPUT.lock keeps a
    second process from writing the same output.

    \b
    bge-rerank rank requests.jsonl -o ranked.jsonl --top-n 10
    bge-rerank rank --model embedded < requests.jsonl | jq .results[0]

    With --ray, SOURCE and OUTPUT are folders of JSONL or Parquet files, and a Ray
    cluster ranks them. Rows come in any order, and a malformed row is written with
    its `error`. Every machine of the cluster must see both folders.

    \b
    bge-rerank rank --ray requests/ -o ranked/ --num-actors 2
    """
    config = dataclasses.replace(config, normalize=normalize)
    check_top_n(top_n)
    check_threshold(threshold, normalize=normalize)
    if on_ray is not None:
        rank_on_ray(
            config,
            source,
            output,
            on_ray,
            top_n=top_n,
            threshold=threshold,
            return_texts=return_texts,
            strict=strict,
            overwrite=overwrite,
            progress=shows_progress(quiet),
        )
        return
    for path in (Path(source), *([] if output is None else [output])):
        if path.is_dir():
            raise click.UsageError(f"{str(path)!r} is a folder; folders need --ray")
    if output is None:
        require_stdout()
    # A pipe can only be read once, like stdin, so its job cannot be resumed.
    input_path = Path(source) if source != "-" and Path(source).is_file() else None
    with ExitStack() as stack:
        lines = check_format(stack.enter_context(_open(source)))
        job = None
        if output is not None:  # before the model is loaded, which takes longer
            config = pin_checkpoint(config)
            settings = {
                **_settings_on_this_machine(config),
                "top_n": top_n,
                "threshold": threshold,
                "return_texts": return_texts,
            }
            job = stack.enter_context(FileJob(output, settings, input_path, overwrite=overwrite))
        scorer = stack.enter_context(Scorer.from_config(config))
        skip = 0 if job is None else job.begin()
        if skip is None:
            click.echo(wrap(f"{output} is already complete."), err=True)
            return
        if skip:
            click.echo(f"Resuming after line {skip}.", err=True)
        progress = stack.enter_context(_progress(show=shows_progress(quiet)))
        rows = rank_lines(
            scorer,
            lines,
            top_n=top_n,
            threshold=threshold,
            return_texts=return_texts,
            strict=strict,
            skip=skip,
            on_malformed=_MalformedLines(),
            progress=progress,
        )
        if job is not None:
            try:
                job.write(rows)
            except KeyboardInterrupt:
                if input_path is not None:
                    click.echo("Stopped. Run the same command again to resume.", err=True)
                raise
        else:
            for batch in rows:
                click.echo("".join(batch), nl=False)
    skipped = f"; {progress.num_malformed} malformed line(s) skipped" if progress.num_malformed else ""
    click.echo(
        wrap(f"{progress.num_rows} request(s), {progress.num_pairs} pair(s) ranked{skipped}."), err=True
    )
    print_summary(progress.num_truncated, progress.num_truncated_queries, config)


@contextmanager
def _open(source: str) -> Iterator[IO[bytes]]:
    """Open the file of requests, or stdin. Raise `UsageError` if stdin is closed."""
    if source == "-" and sys.stdin is None:
        raise click.UsageError("standard input is closed; give a SOURCE file")
    with click.open_file(source, "rb") as file:
        if file.isatty():
            end = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
            click.echo(f"Reading requests from the terminal. Press {end} to end the input.", err=True)
        yield file


def _settings_on_this_machine(config: ScorerConfig) -> dict[str, Any]:
    """Return the settings that scores depend on, with the device and precision that `auto` selects.

    The number of threads is one of them, although it changes scores by rounding errors only. A resumed job
    then has the same scores as one that was not interrupted.
    """
    from bge_rerank_integrations.engine.describe import describe_precision

    chosen = describe_precision(config)
    return {
        **settings_of_scores(config),
        "device": chosen.device.partition(":")[0],  # without the number of a GPU
        "dtype": chosen.dtype,
        "num_threads": config.num_threads,
    }


class _MalformedLines:
    """Reports malformed lines on stderr, but at most `_MAX_NAMED_LINES` of them."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, error: MalformedLineError) -> None:
        self._count += 1
        if self._count <= _MAX_NAMED_LINES:
            tqdm.write(wrap(name_options(f"{error}; skipped")), file=sys.stderr)
        elif self._count == _MAX_NAMED_LINES + 1:
            tqdm.write("Further malformed lines are counted but not listed.", file=sys.stderr)


@contextmanager
def _progress(*, show: bool) -> Iterator[Progress]:
    with tqdm(unit="pair", disable=not show) as bar:
        yield Progress(on_change=lambda progress: bar.update(progress.num_pairs - bar.n))
