"""`bge-rerank rank --ray` ranks the requests in a folder of files on a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from bge_rerank_integrations.cli.console import wrap
from bge_rerank_integrations.cli.jobs.folder_job import FolderJob
from bge_rerank_integrations.cli.jobs.input_folder import find_input_files
from bge_rerank_integrations.cli.jobs.job_record import resolve_output
from bge_rerank_integrations.cli.jobs.requests import REQUEST_FORM, MalformedInputError
from bge_rerank_integrations.cli.jobs.score_settings import settings_of_scores
from bge_rerank_integrations.cli.ray_options import RayOptions
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.checkpoint.locate import pin_checkpoint
from bge_rerank_integrations.errors import ConfigError

if TYPE_CHECKING:
    from bge_rerank_integrations.ray.files import Written

_CONNECT_TIMEOUT_S: Final = 10.0


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
    from bge_rerank_integrations.cli.jobs.raw_lines import rank_raw_lines
    from bge_rerank_integrations.ray.actors import ActorOptions
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
    target = resolve_output(output)
    if target.is_relative_to(folder):
        raise click.UsageError(
            "the output folder lies inside SOURCE, and would be read as input the next time"
        )
    files, is_parquet = find_input_files(folder)
    config = pin_checkpoint(config)
    settings = {
        **settings_of_scores(config),
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
                target,
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
                target,
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


def _connect(address: str, *, progress: bool) -> None:
    import ray

    where = address or os.environ.get("RAY_ADDRESS", "")
    if where.startswith("ray://"):
        raise ConfigError(
            "jobs do not run over Ray Client (ray://); give the address HOST:PORT on a machine of the "
            "cluster, or run the command with `ray job submit`"
        )
    if not ray.is_initialized():
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
    host, _, port = address.rpartition(":")
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
