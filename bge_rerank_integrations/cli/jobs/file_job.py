"""Writing the rows of a ranking job to a file, and resuming the job after it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bge_rerank_integrations.cli.jobs.job_record import (
    INPUT,
    JobRecord,
    record_path,
    resolve_output,
    temporary_path,
)
from bge_rerank_integrations.cli.jobs.requests import MalformedInputError
from bge_rerank_integrations.errors import DatasetError


class FileJob:
    """The output file of a ranking job that can be stopped and resumed.

    The job appends its rows to `OUTPUT.partial`, in the order of the input, and records its settings in
    `OUTPUT.job.json`. When the job is complete, `OUTPUT.partial` is renamed to `OUTPUT`. A job with the same
    settings and input resumes after the last complete row. `OUTPUT.lock` keeps a second process from writing
    the same output.

    Args:
        output: Path of the output file.
        settings: All settings that decide what is written. They must be JSON-safe. A job with other
            settings cannot resume this one.
        input_path: The input file. Its contents are part of the job's identity. None for an input that can
            only be read once, such as a pipe: the job cannot be resumed, because nothing shows whether a new
            input is the same.
        overwrite: Start from the beginning, even if an output exists. A complete output file is kept until
            the new one is complete.

    Raises:
        DatasetError: The input cannot be read or is also the output, or the output is not a regular file.

    Example:
        >>> with FileJob(Path("ranked.jsonl"), {"model": "embedded"}, Path("requests.jsonl")) as job:
        ...     done = job.begin()
        ...     if done is not None:
        ...         job.write(rank_lines(scorer, source, skip=done, ...))
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], input_path: Path | None, *, overwrite: bool = False
    ) -> None:
        output = resolve_output(output)
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        if output.exists() and not output.is_file():
            raise DatasetError(f"{output} is not a regular file; to write to stdout, give no output file")
        own = (output, self._partial, record_path(output), temporary_path(output))
        if input_path is not None and input_path.resolve() in own:
            raise DatasetError(f"{input_path} is the input; choose another output file")
        input_sha256 = None if input_path is None else _sha256(input_path)
        self._record = JobRecord(output, {**settings, INPUT: input_sha256})
        self._can_go_on = input_path is not None
        self._overwrite = overwrite

    def __enter__(self) -> FileJob:
        """Lock the output file.

        Raises:
            DatasetError: Another process has locked it.
        """
        self._record.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Unlock the output file."""
        self._record.__exit__(*exc_info)

    def begin(self) -> int | None:
        """Start or resume the job. A row that was only partly written is removed.

        Returns:
            The number of the last line that is already ranked, 0 for a new job, or None if the job is
            complete.

        Raises:
            DatasetError: The output exists and belongs to a job with other settings or another input, or to
                an unknown job.
        """
        if self._overwrite:
            # Empty the partial file before the record changes. An interruption at any point then leaves a
            # job that is visibly incomplete.
            self._partial.write_bytes(b"")
        else:
            self._check()
            if self._output.exists() and not self._partial.exists():
                return None
        self._record.write()
        if not self._partial.exists():
            return 0
        with self._partial.open("r+b") as file:
            end = _after_line_feed(file, file.seek(0, os.SEEK_END))
            file.truncate(end)
            file.seek(_after_line_feed(file, end - 1))
            last = file.read()
        if not last:
            return 0
        try:
            return int(json.loads(last)["line"])
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{self._partial} does not end with a row of this job; remove the extra lines or use "
                "--overwrite"
            ) from error

    def write(self, batches: Iterable[list[str]]) -> None:
        """Append rows as they arrive. After the last one, rename the partial file to the output's name.

        Raises:
            MalformedInputError: Reading `batches` raises it. If no row was written, the job's files are
                removed.
            DatasetError: The partial file cannot be written. The job can be resumed.
        """
        try:
            with self._partial.open("ab", buffering=0) as file:
                for rows in batches:
                    self._append(file, "".join(rows).encode())
                with self._name_in_errors():
                    os.fsync(file.fileno())
        except MalformedInputError:
            self._discard_if_empty()
            raise
        self._partial.replace(self._output)

    def _append(self, file: IO[bytes], data: bytes) -> None:
        with self._name_in_errors():
            while data:  # one call writes only a part if the disk is nearly full
                data = data[file.write(data) :]

    @contextmanager
    def _name_in_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of a file that is open, which does not name it
            raise DatasetError(f"{self._partial} cannot be written: {error.strerror}") from error

    def _discard_if_empty(self) -> None:
        # With --overwrite, an older output can still exist. The empty partial file then stays, because it
        # shows that the old output does not belong to this job.
        if not self._output.exists() and not self._partial.stat().st_size:
            self._partial.unlink()
            self._record.path.unlink()

    def _check(self) -> None:
        if not (self._output.exists() or self._partial.exists()):
            return
        if not self._record.path.exists():
            raise DatasetError(
                f"{self._output} already exists and was not written by a ranking job; choose another output "
                "file or use --overwrite"
            )
        if not self._can_go_on:
            raise DatasetError(
                f"{self._output} already exists, and its job cannot be resumed because the input is a "
                "stream; use an input file or --overwrite"
            )
        self._record.check("use the same settings, another output file, or --overwrite")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _after_line_feed(file: IO[bytes], end: int) -> int:
    """Return the position after the last line feed before `end`, or 0 if there is none."""
    while end > 0:
        start = max(end - (1 << 16), 0)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0
