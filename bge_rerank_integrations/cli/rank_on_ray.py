"""`bge-rerank rank --ray` ranks the requests in a folder of files on a Ray cluster."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from bge_rerank_integrations import __version__
from bge_rerank_integrations.cli.console import wrap
from bge_rerank_integrations.cli.jobs.folder_job import FolderJob
from bge_rerank_integrations.cli.jobs.input_folder import find_input_files
from bge_rerank_integrations.cli.jobs.rank_lines import format_row
from bge_rerank_integrations.cli.jobs.requests import (
    REQUEST_FORM,
    MalformedInputError,
    MalformedLineError,
    Request,
    parse_request,
)
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import ConfigError, RerankError

if TYPE_CHECKING:
    from bge_rerank_integrations.ray.folders import Line, ResultLine, Written
    from bge_rerank_integrations.scorer import Scorer

_Command = Callable[..., None]

# What `--ray` can be followed by. Anything else is the command's SOURCE.
_ADDRESS: Final = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
_ANY_CLUSTER: Final = ""
_CONNECT_TIMEOUT_S: Final = 10.0
# A job can be resumed with other values of these settings, because they do not change the scores.
_NOT_DECISIVE: Final = frozenset(
    {"cache_folder", "local_files_only", "devices", "max_wait_ms", "max_queued_tokens", "num_threads"}
)


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """The options of `rank` that only have a meaning on Ray.

    Attributes:
        address: Address of the cluster, or an empty string for the cluster in `RAY_ADDRESS` or a local one.
        num_actors: Number of actors.
        cpus_per_actor: Logical CPUs that each actor reserves; None leaves it to the package.
        gpus_per_actor: GPUs that each actor reserves.
        rows_per_block: Maximum number of rows in a block and in an output file; None means the default.
        query_column: Column of a Parquet file with the query.
        passages_column: Column of a Parquet file with the passages.
    """

    address: str
    num_actors: int
    cpus_per_actor: float | None
    gpus_per_actor: float
    rows_per_block: int | None
    query_column: str
    passages_column: str


class RankCommand(click.Command):
    """Lets the address after `--ray` be left out, although SOURCE may follow."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give `--ray` an empty address if the next argument is not one."""
        args = list(args)
        for index, arg in enumerate(args):
            if arg == "--ray" and not _ADDRESS.fullmatch("".join(args[index + 1 : index + 2])):
                args[index] = f"--ray={_ANY_CLUSTER}"
        return super().parse_args(ctx, args)


def ray_options(command: _Command) -> _Command:
    """Add the options of a job on Ray. The command receives them as `on_ray`, or None without `--ray`."""
    defaults: dict[str, Any] = {
        "num_actors": 1,
        "cpus_per_actor": None,
        "gpus_per_actor": 0.0,
        "rows_per_block": None,
        "query_column": "query",
        "passages_column": "passages",
    }

    @functools.wraps(command)
    def with_ray(ray_address: str | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in defaults}
        unused = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if ray_address is None and unused:
            raise click.UsageError(f"{', '.join(unused)} can only be used with --ray")
        chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
        on_ray = None if ray_address is None else RayOptions(address=ray_address, **chosen)
        command(on_ray=on_ray, **values)

    decorated: _Command = with_ray
    for option in (
        click.option("--passages-column", help="Parquet column with the passages.  [default: passages]"),
        click.option("--query-column", help="Parquet column with the query.  [default: query]"),
        click.option(
            "--rows-per-block",
            type=click.IntRange(min=1),
            help="Maximum number of requests in an output file, and of requests to rank again after a "
            "failure.  [default: 256]",
        ),
        click.option(
            "--gpus-per-actor",
            type=click.FloatRange(min=0),
            help="GPUs that each actor reserves.  [default: 0]",
        ),
        click.option(
            "--cpus-per-actor",
            type=click.FloatRange(min=0),
            help="Logical CPUs that each actor reserves.  [default: 1, or less on a small machine]",
        ),
        click.option(
            "--num-actors",
            type=click.IntRange(min=1),
            help="Processes that load the model and rank.  [default: 1]",
        ),
        click.option(
            "--ray",
            "ray_address",
            metavar="[ADDRESS]",
            help="Rank a folder on the Ray cluster at ADDRESS.  [default: RAY_ADDRESS, or this machine]",
        ),
    ):
        decorated = option(decorated)
    return decorated


def rank_on_ray(
    config: ScorerConfig,
    source: str,
    output: Path | None,
    on_ray: RayOptions,
    *,
    top_n: int | None,
    threshold: float | None,
    return_texts: bool,
    strict: bool,
    overwrite: bool,
    progress: bool,
) -> None:
    """Rank the requests in the files of a folder, and write a folder.

    Args:
        config: The settings of the scorers.
        source: The folder with the input files.
        output: The folder to write to.
        on_ray: The options of the job on Ray.
        top_n: As in `Scorer.rank`, for each request.
        threshold: As in `Scorer.rank`, for each request.
        return_texts: Include each passage's text in its result. Parquet files always contain the passages.
        strict: Stop at the first malformed request.
        overwrite: Start from the beginning and replace the output folder.
        progress: Show Ray's progress bars.

    Raises:
        click.UsageError: The input is not a folder, or there is no output folder.
        MalformedInputError: The folder has no request, or `strict` is true and a request is malformed.
        RerankError: The job cannot run.
    """
    from bge_rerank_integrations.ray.data import ActorOptions
    from bge_rerank_integrations.ray.folders import (
        check_parquet_files,
        rank_jsonl_folder,
        rank_parquet_folder,
    )

    if not Path(source).is_dir():
        raise click.UsageError("--ray reads a folder; give the folder as SOURCE")
    if output is None:
        raise click.UsageError("--ray writes a folder; give its name with -o")
    folder = Path(source).resolve()
    if output.resolve().is_relative_to(folder):
        raise click.UsageError(
            "the output folder lies inside SOURCE, and would be read as input the next time"
        )
    files, is_parquet = find_input_files(folder)
    settings = {
        **_decisive(config),
        "top_n": top_n,
        "threshold": threshold,
        "return_texts": return_texts,
        "columns": [on_ray.query_column, on_ray.passages_column] if is_parquet else None,
    }
    actors = ActorOptions(
        num_actors=on_ray.num_actors,
        num_cpus=on_ray.cpus_per_actor,
        num_gpus=on_ray.gpus_per_actor,
        rows_per_block=on_ray.rows_per_block,
    )
    with FolderJob(output, settings, files, overwrite=overwrite) as job:
        if job.is_complete():
            click.echo(wrap(f"{output} is already complete."), err=True)
            if job.problem:
                raise MalformedInputError(job.problem)
            return
        if is_parquet:
            check_parquet_files(files, (on_ray.query_column, on_ray.passages_column))
        _connect(on_ray.address, progress=progress)
        job.begin()
        is_resumed = job.is_resumed
        if is_resumed:
            click.echo("Resuming. Requests that are already ranked are skipped.", err=True)
        if is_parquet:
            written = rank_parquet_folder(
                files,
                output.resolve(),
                config,
                query_column=on_ray.query_column,
                passages_column=on_ray.passages_column,
                top_n=top_n,
                threshold=threshold,
                strict=strict,
                actors=actors,
                checkpoint=job.checkpoint,
            )
        else:
            written = rank_jsonl_folder(
                files,
                folder,
                output.resolve(),
                config,
                partial(
                    rank_raw_lines, top_n=top_n, threshold=threshold, return_texts=return_texts, strict=strict
                ),
                actors=actors,
                checkpoint=job.checkpoint,
            )
        problem = "" if is_resumed else _problem(written)
        job.finish(problem)
    num_ranked = written.num_rows - written.num_errors
    malformed = f"; {written.num_errors} malformed" if written.num_errors else ""
    click.echo(wrap(f"{num_ranked} request(s) ranked{malformed}."), err=True)
    if problem:
        raise MalformedInputError(problem)


def rank_raw_lines(
    scorer: Scorer,
    lines: Sequence[Line],
    *,
    top_n: int | None,
    threshold: float | None,
    return_texts: bool,
    strict: bool,
) -> list[ResultLine]:
    """Rank JSONL lines. A malformed line gives a row with an error.

    Args:
        scorer: The reranker.
        lines: The lines.
        top_n: As in `Scorer.rank`.
        threshold: As in `Scorer.rank`.
        return_texts: Include each passage's text in its result.
        strict: Raise at the first malformed line.

    Returns:
        For each line, in order, `{"file": ..., "line": 1, "id": ..., "results": [...]}` as in `rank_lines`,
        or `{"file": ..., "line": 1, "error": ...}`.

    Raises:
        MalformedInputError: A line is malformed and `strict` is true.
    """
    from bge_rerank_integrations.ray.folders import ResultLine
    from bge_rerank_integrations.ray.rows import rank_rows

    parsed = [_parse(line) for line in lines]
    requests = [each for each in parsed if isinstance(each, Request)]
    rankings = iter(
        rank_rows(scorer, [(request.query, request.texts) for request in requests], top_n, threshold)
    )
    results = []
    for line, request in zip(lines, parsed, strict=True):
        outcome = next(rankings) if isinstance(request, Request) else request
        if isinstance(outcome, MalformedLineError):
            outcome = RerankError(outcome.reason)
        row: dict[str, Any] = {"file": line.file}
        if isinstance(outcome, RerankError):
            if strict:
                raise MalformedInputError(f"{line.file}, line {line.number}: {outcome}")
            row |= {"line": line.number, "error": str(outcome)}
        else:
            assert isinstance(request, Request)
            row |= format_row(request, outcome, return_texts=return_texts)
        results.append(ResultLine(json.dumps(row), "error" in row))
    return results


def _parse(line: Line) -> Request | MalformedLineError:
    try:
        return parse_request(line.number, line.raw)
    except MalformedLineError as error:
        return error


def _decisive(config: ScorerConfig) -> dict[str, Any]:
    """Return the settings that decide a job's scores.

    The devices of the actors are unknown here, so `auto` stays as it is.
    """
    from bge_rerank_integrations.engine.describe import describe_checkpoint

    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_DECISIVE}
    return {
        **settings,
        "version": __version__,
        "checkpoint": describe_checkpoint(config).fingerprint,
    }


def _connect(address: str, *, progress: bool) -> None:
    import ray

    if not ray.is_initialized():
        where = address or os.environ.get("RAY_ADDRESS", "")
        _check_reachable(where)
        # A command that ranks files does not report its use to anyone.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(
                address=address or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError:
            raise _unreachable(where or "this machine") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = progress


def _check_reachable(address: str) -> None:
    """Raise an error if nothing listens at an address. Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "://" in host or not (host and port.isdecimal()):
        return  # a word such as `auto`, no address, or one of another kind
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, ValueError):  # the last two for ports and names that no host can have
        raise _unreachable(address) from None


def _unreachable(address: str) -> ConfigError:
    return ConfigError(f"cannot connect to a Ray cluster at {address!r}; is it running?")


def _problem(written: Written) -> str:
    """Return what is wrong with an input without a request, or an empty string."""
    if written.num_rows > written.num_errors:
        return ""
    if not written.num_rows:
        return "the input is empty"
    return (
        "no row of the input is a request; the column or field `error` of the output says why. A request is "
        f"one line of JSON: `{REQUEST_FORM}`"
    )
