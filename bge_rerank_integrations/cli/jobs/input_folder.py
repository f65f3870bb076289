"""The input files of a ranking job on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from bge_rerank_integrations.cli.console import wrap
from bge_rerank_integrations.cli.jobs.requests import MalformedInputError

_JSONL: Final = frozenset({".jsonl", ".ndjson"})
_PARQUET: Final = frozenset({".parquet"})
_READ: Final = _JSONL | _PARQUET


def find_input_files(folder: Path) -> tuple[list[Path], bool]:
    """Return the files of a folder in a fixed order, and whether they are Parquet files.

    stderr says how many other files there are, and names the first one.

    Raises:
        MalformedInputError: The folder contains no such file.
        click.UsageError: The folder contains files of both kinds or partition folders. Or a name is not
            UTF-8.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink())  # the files of a linked folder are not found
        # Other programs put files with these names beside their output, such as `_SUCCESS`.
        and not any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts)
    )
    files: list[Path] = []
    others: list[Path] = []
    for path in found:
        (files if path.is_file() and _suffix(path) in _READ else others).append(path)
    for path in files:
        _check_name(path)
    kinds = {_suffix(path) in _PARQUET for path in files}
    if not kinds:
        raise MalformedInputError(f"{folder} contains no file that ends with .jsonl, .ndjson or .parquet")
    if len(kinds) > 1:
        raise click.UsageError(f"{folder} contains both JSONL and Parquet files; put them into two folders")
    is_parquet = kinds.pop()
    if others:
        first = click.format_filename(others[0].relative_to(folder))
        not_read = (
            f"Files that are not read: {len(others)}, such as {first}. Only files whose names end with "
            ".jsonl, .ndjson or .parquet are read, and no linked folders."
        )
        click.echo(wrap(not_read), err=True)
    parts = (part for path in files for part in path.relative_to(folder).parts[:-1] if "=" in part)
    if is_parquet and (partition := next(parts, None)):
        raise click.UsageError(
            f"{folder} is partitioned into folders such as {partition}, whose column would be lost; read it "
            "with ray.data.read_parquet and rank it with rerank_dataset"
        )
    return files, is_parquet


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _check_name(path: Path) -> None:
    """Raise an error if a path is not UTF-8. Results in JSONL contain it, and pyarrow could not open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = click.format_filename(path)
        raise click.UsageError(f"the file name {name} is not UTF-8; rename it") from None
