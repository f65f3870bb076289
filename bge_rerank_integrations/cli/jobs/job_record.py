"""What file jobs and folder jobs share: a record of their settings, and a lock, beside the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from bge_rerank_integrations.errors import DatasetError

INPUT: Final = "input_sha256"
"""Name of the setting with the digest of the input file."""


def record_path(output: Path) -> Path:
    """Return the path of the record of an output file or folder."""
    return output.with_name(output.name + ".job.json")


def temporary_path(output: Path) -> Path:
    """Return the path of the record while it is written."""
    path = record_path(output)
    return path.with_name(path.name + ".tmp")


def resolve_output(output: Path) -> Path:
    """Return the path that symbolic links lead to, so that the links stay when a file replaces it.

    Raises:
        DatasetError: The links form a loop.
    """
    try:
        resolved = output.resolve()
        is_loop = resolved.is_symlink()  # since Python 3.13
    except RuntimeError:  # before it
        is_loop = True
    if is_loop:
        raise DatasetError(f"{output} is a symbolic link in a loop")
    return resolved


class JobRecord:
    """The record of a job in `OUTPUT.job.json`. In a `with` statement, it holds the lock `OUTPUT.lock`.

    Args:
        output: Path of the output file or folder.
        settings: All settings that decide what is written. They must be JSON-safe.

    Attributes:
        path: Path of the record.

    Raises:
        DatasetError: Another process has locked the output when the `with` statement begins.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.path = record_path(output)
        self._output = output
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._lock = FileLock(output.with_name(output.name + ".lock"), timeout=0)

    def __enter__(self) -> JobRecord:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise DatasetError(f"another process is writing {self._output}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def write(self) -> None:
        """Write the settings. An interruption leaves the old record or the new one."""
        temporary = temporary_path(self._output)
        temporary.write_text(json.dumps(self._settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def check(self, advice: str) -> None:
        """Compare the settings with those in the record.

        Args:
            advice: What the user can do if they differ.

        Raises:
            DatasetError: The settings differ, or the record is damaged.
        """
        try:
            recorded = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            recorded = None
        if not isinstance(recorded, dict):
            raise DatasetError(f"{self.path} is damaged; use --overwrite to start from the beginning")
        names = {*recorded, *self._settings}
        differing = sorted(name for name in names if recorded.get(name) != self._settings.get(name))
        if differing:
            other = f"other settings ({', '.join(differing)})"
            if differing == [INPUT]:
                other = "another content of its input file"
            raise DatasetError(f"{self._output} was started with {other}; {advice}")
