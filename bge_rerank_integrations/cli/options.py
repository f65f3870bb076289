"""Options that several commands have, and how their values become a config."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import click

from bge_rerank_integrations.config import DEFAULT_MODEL, EMBEDDED_MODEL, DType, ScorerConfig

_Command = Callable[..., None]

EXISTING_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)


def _in_a_folder(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file to be written whose folder is not there, before any work is done."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"folder {str(path.parent)!r} does not exist", param=parameter)
    return path


def _split(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else value.split(",")


def output_option(*names: str, text: str) -> Callable[[_Command], _Command]:
    """Add an option that names a file to be written.

    Args:
        names: As they are typed.
        text: Its help.
    """
    kind = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option(*names, type=kind, callback=_in_a_folder, help=text)


EXIT_BAD_DATA: Final = 3
"""Exit status of `rank --strict` at a malformed line, and of `check` where the scores disagree."""


def config_options(default_model: str = DEFAULT_MODEL) -> Callable[[_Command], _Command]:
    """Add the options of a model and a device; the command gets them as `config`.

    Args:
        default_model: What `--model` is without being given.
    """
    options: list[Callable[[_Command], _Command]] = [
        click.option(
            "--model",
            default=default_model,
            show_default=True,
            help=f"Hub id or folder of a BGE reranker; `{EMBEDDED_MODEL}` is the small English model that "
            "comes with this package.",
        ),
        click.option("--revision", help="Branch, tag or commit on the hub."),
        click.option("--cache-folder", type=click.Path(), help="Where hub downloads are kept."),
        click.option("--local-files-only", is_flag=True, help="Never ask the network."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--devices",
            callback=_split,
            help="Several devices instead, a copy of the model on each: cuda:0,cuda:1.",
        ),
        click.option("--dtype", type=click.Choice(get_args(DType)), default="auto", show_default=True),
        click.option(
            "--max-length", type=int, default=512, show_default=True, help="Longest pair, in tokens."
        ),
        click.option(
            "--query-max-length", type=int, help="Longest query, in tokens.  [default: ¾ of --max-length]"
        ),
        click.option("--max-batch-tokens", type=int, help="Most tokens in one forward pass."),
        click.option("--num-threads", type=int, help="CPU threads to compute with."),
    ]

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def with_config(**values: Any) -> None:
            names = [
                "model",
                "revision",
                "cache_folder",
                "local_files_only",
                "device",
                "devices",
                "dtype",
                "max_length",
                "query_max_length",
                "max_batch_tokens",
                "num_threads",
            ]
            config = ScorerConfig(**{name: values.pop(name) for name in names})
            command(config=config, **values)

        decorated: _Command = with_config
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def json_option(command: _Command) -> _Command:
    """Add `--json`, which the command gets as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def quiet_option(command: _Command) -> _Command:
    """Add `--quiet`."""
    return click.option("--quiet", is_flag=True, help="No progress bar.")(command)


def shows_progress(quiet: bool) -> bool:
    """Whether to show a progress bar: on a terminal, unless it is unwanted."""
    return not quiet and sys.stderr.isatty()
