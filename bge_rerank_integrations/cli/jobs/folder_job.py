"""The output folder of a ranking job on Ray, and resuming the job after it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.cli.jobs.job_record import JobRecord
from bge_rerank_integrations.errors import DatasetError

# Spark, Hadoop and their readers use this name for a complete folder.
_COMPLETE: Final = "_SUCCESS"


class FolderJob:
    """The output folder of a ranking job that can be stopped and resumed.

    `OUTPUT.job.json` records the job's settings and inputs, and the folder `OUTPUT.checkpoint` records which
    rows are written. When the job is complete, `OUTPUT/_SUCCESS` exists and the checkpoint is deleted.
    `OUTPUT.lock` keeps a second process on this machine from writing the same output.

    Args:
        output: Path of the output folder.
        settings: All settings that decide what is written. They must be JSON-safe. A job with other
            settings cannot resume this one.
        files: The input files. Their names, sizes and times of change are part of the job's identity.
        overwrite: Start from the beginning, even if an output exists.

    Raises:
        DatasetError: The output lies inside the input, or it is a file.

    Example:
        >>> with FolderJob(Path("ranked"), {"model": "embedded"}, files) as job:
        ...     if job.begin():
        ...         ...  # write rows to the folder, and their numbers to job.checkpoint
        ...         job.finish()
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], files: Sequence[Path], *, overwrite: bool = False
    ) -> None:
        output = output.resolve()
        if output.exists() and not output.is_dir():
            raise DatasetError(f"{output} is a file; choose another output folder")
        if any(output in file.resolve().parents for file in files):
            raise DatasetError(f"{output} contains the input; choose another output folder")
        self.checkpoint = output.with_name(output.name + ".checkpoint")
        self._output = output
        self._overwrite = overwrite
        inputs = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        self._record = JobRecord(output, {**settings, "inputs": inputs})

    def __enter__(self) -> FolderJob:
        """Lock the output folder.

        Raises:
            DatasetError: Another process has locked it.
        """
        self._record.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Unlock the output folder."""
        self._record.__exit__(*exc_info)

    def begin(self) -> bool:
        """Start or resume the job.

        Returns:
            Whether there is anything to do. False means that the job is complete.

        Raises:
            DatasetError: The folder contains files of a job with other settings or inputs, or of no job.
        """
        if self._overwrite:
            self._start_over()
        elif self._record.path.exists():
            self._record.check("use the same settings and inputs, another output folder, or --overwrite")
            if (self._output / _COMPLETE).exists():
                return False
            if not _has_content(self._output):
                # Somebody has deleted the output. Without its checkpoint, all rows are written again.
                _delete(self.checkpoint)
        elif _has_content(self._output):
            raise DatasetError(f"{self._output} is not empty; choose another output folder")
        # The record comes first, so that a folder with results always has one.
        self._record.write()
        return True

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run of the job has written rows."""
        return _has_content(self.checkpoint)

    def finish(self) -> None:
        """Mark the output as complete, and delete the checkpoint."""
        self._output.mkdir(exist_ok=True)
        (self._output / _COMPLETE).touch()
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def _start_over(self) -> None:
        if _has_content(self._output) and not self._record.path.exists():
            raise DatasetError(
                f"{self._output} is not empty and was not written by a ranking job; choose another "
                "output folder"
            )
        # If this process is killed here, the folder and its checkpoint no longer fit together. With this
        # record, no job resumes them without --overwrite.
        JobRecord(self._output, {"overwriting": True}).write()
        (self._output / _COMPLETE).unlink(missing_ok=True)
        _delete(self._output)
        _delete(self.checkpoint)


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _delete(folder: Path) -> None:
    """Delete a folder if it exists. Raise an error if a file stays: the new run would use it."""
    if folder.exists():
        shutil.rmtree(folder)
