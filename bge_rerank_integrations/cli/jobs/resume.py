"""Writing the rows of a ranking job to a file, and resuming the job after it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from bge_rerank_integrations.cli.jobs.requests import MalformedInputError
from bge_rerank_integrations.errors import DatasetError


class RankJob:
    """One output file that is finished exactly once, however often its job is killed.

    Rows go to `OUTPUT.partial`, in the input's order, and what the job is goes to `OUTPUT.job.json`; a
    finished job renames the first. Whoever starts the same job again goes on after the last whole row.
    `OUTPUT.lock` keeps a second process out.

    Args:
        output: Where the rows are to be.
        settings: Whatever decides what is written, JSON-safe: another model is another job.
        input_path: The input, whose contents are part of what the job is. None where it cannot be read
            twice; such a job cannot be gone on with, since nobody could tell another input from it.
        overwrite: Begin again, whatever is there. A file that is finished stays until another is.

    Raises:
        DatasetError: The input cannot be read, or is the output; or the output is no plain file.

    Example:
        >>> with RankJob(Path("ranked.jsonl"), {"model": "embedded"}, Path("requests.jsonl")) as job:
        ...     done = job.begin()
        ...     if done is not None:
        ...         job.write(rank_lines(scorer, source, skip=done, ...))
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], input_path: Path | None, *, overwrite: bool = False
    ) -> None:
        output = output.resolve()
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        self._record = output.with_name(output.name + ".job.json")
        if output.exists() and not output.is_file():
            raise DatasetError(f"{output} is not a plain file; leave the output out to write to stdout")
        if input_path is not None and input_path.resolve() in (output, self._partial, self._record):
            raise DatasetError(f"{input_path} is the input; give the output another name")
        self._lock = FileLock(output.with_name(output.name + ".lock"), timeout=0)
        self._can_go_on = input_path is not None
        self._overwrite = overwrite
        self._settings = {**settings, "input_sha256": None if input_path is None else _sha256(input_path)}

    def __enter__(self) -> RankJob:
        """Keep other processes out.

        Raises:
            DatasetError: Another process is writing this file.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            raise DatasetError(f"another process is writing {self._output}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Let others in."""
        self._lock.release()

    def begin(self) -> int | None:
        """Cut off a row that was only half written.

        Returns:
            The number of the last line that is done; None where all is.

        Raises:
            DatasetError: `output` belongs to another job, or is there and nobody knows from what.
        """
        if self._overwrite:
            # This first: what is not finished is never taken for it, whenever this is interrupted.
            self._partial.write_bytes(b"")
        else:
            self._check()
            if self._output.exists() and not self._partial.exists():
                return None
        _write_atomically(self._record, json.dumps(self._settings, indent=1, sort_keys=True) + "\n")
        if not self._partial.exists():
            return 0
        with self._partial.open("r+b") as file:
            file.truncate(_end_of_last_line(file))
            last = _last_line(file)
        if not last:
            return 0
        try:
            return int(json.loads(last)["line"])
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{self._partial} does not end with a row of this job; cut off what is not, or --overwrite"
            ) from error

    def write(self, batches: Iterable[list[str]]) -> None:
        """Append rows as they come, and give the file its name once they are all there.

        Raises:
            MalformedInputError: As the batches do. If no row was written, nothing is left behind.
        """
        try:
            with self._partial.open("a", encoding="utf-8", newline="\n") as file:
                for rows in batches:
                    file.writelines(rows)
                    file.flush()
                os.fsync(file.fileno())
        except MalformedInputError:
            self._discard_if_empty()
            raise
        self._partial.replace(self._output)

    def _discard_if_empty(self) -> None:
        # An older output is still there under --overwrite, and the empty file says that it is not this job's.
        if not self._output.exists() and not self._partial.stat().st_size:
            self._partial.unlink()
            self._record.unlink()

    def _check(self) -> None:
        if not (self._output.exists() or self._partial.exists()):
            return
        if not self._record.exists():
            raise DatasetError(
                f"{self._output} is there already, from something else; use another name or --overwrite"
            )
        if not self._can_go_on:
            raise DatasetError(
                f"{self._output} is there already, and its input was a stream, which cannot be told from "
                "another: put it into a file to be able to go on, or --overwrite"
            )
        try:
            recorded = json.loads(self._record.read_text(encoding="utf-8"))
        except ValueError:
            recorded = None
        if not isinstance(recorded, dict):
            raise DatasetError(f"{self._record} is damaged; use --overwrite to begin again")
        current = json.loads(json.dumps(self._settings))
        differing = sorted(key for key in {*recorded, *current} if recorded.get(key) != current.get(key))
        if differing:
            raise DatasetError(
                f"{self._output} was begun with other settings ({', '.join(differing)}); go on with the "
                "same, use another name, or --overwrite"
            )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _end_of_last_line(file: IO[bytes]) -> int:
    """Return the position after the last line feed."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - (1 << 16), 0)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _last_line(file: IO[bytes]) -> bytes:
    """Return the last line of a file that ends with a line feed."""
    end = max(file.seek(0, os.SEEK_END) - 1, 0)
    start = end
    while start:
        begin = max(start - (1 << 16), 0)
        file.seek(begin)
        position = file.read(start - begin).rfind(b"\n")
        if position >= 0:
            start = begin + position + 1
            break
        start = begin
    file.seek(start)
    return file.read(end - start)
