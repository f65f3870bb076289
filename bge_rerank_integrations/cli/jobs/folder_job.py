"""The output folder of a ranking job on Ray, and resuming the job after it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.cli.jobs.job_record import JobRecord, resolve_output
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
        DatasetError: The output folder contains an input file, or it is a file.

    Example:
        >>> with FolderJob(Path("ranked"), {"model": "embedded"}, files) as job:
        ...     if not job.is_complete():
        ...         job.begin()
        ...         ...  # write rows to the folder, and their numbers to job.checkpoint
        ...         job.finish()
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], files: Sequence[Path], *, overwrite: bool = False
    ) -> None:
        output = resolve_output(output)
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

    def is_complete(self) -> bool:
        """Check that the job can start or be resumed, and return whether it is complete. Change nothing.

        Raises:
            DatasetError: The folder contains files of a job with other settings or inputs, or of no job. Or
                it is unknown which rows are written.
        """
        has_output = _has_content(self._output)
        has_record = self._record.path.exists()
        if not has_record and self._output.exists() and any(self._output.iterdir()):
            raise DatasetError(
                f"{self._output} is not empty and was not written by a ranking job; choose another "
                "output folder"
            )
        if self._overwrite:
            return False
        if not has_record:
            if _has_content(self.checkpoint):
                raise DatasetError(
                    f"{self.checkpoint} is left from another job, whose rows would be skipped; delete it, or "
                    "choose another output folder"
                )
            return False
        self._record.check("use the same settings and inputs, another output folder, or --overwrite")
        if (self._output / _COMPLETE).exists():
            return True
        if has_output and not _has_content(self.checkpoint):
            # The job would write the rows of the output again.
            raise DatasetError(
                f"{self._output} has neither {_COMPLETE} nor {self.checkpoint.name}, so it is unknown which "
                "rows it contains; use --overwrite to start from the beginning"
            )
        return False

    def begin(self) -> None:
        """Start or resume a job that `is_complete` has checked."""
        if self._overwrite:
            self._delete_output()
        if not _has_content(self._output):
            # Somebody has deleted the output. Without its checkpoint, all rows are written again.
            _delete(self.checkpoint)
        # The record comes first, so that a folder with results always has one.
        self._record.write()

    @property
    def problem(self) -> str:
        """The argument of `finish` in the run that completed this job."""
        return (self._output / _COMPLETE).read_text(encoding="utf-8")

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run of the job has written rows."""
        return _has_content(self.checkpoint)

    def finish(self, problem: str = "") -> None:
        """Mark the output as complete, and delete the checkpoint.

        Args:
            problem: What is wrong with the whole input, to report it again if the job is run again.
        """
        self._output.mkdir(exist_ok=True)
        (self._output / _COMPLETE).write_text(problem, encoding="utf-8")
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def _delete_output(self) -> None:
        # If this process is killed here, the folder and its checkpoint no longer fit together. With this
        # record, no job resumes them without --overwrite.
        JobRecord(self._output, {"overwriting": True}).write()
        (self._output / _COMPLETE).unlink(missing_ok=True)
        _delete(self._output)
        _delete(self.checkpoint)


def _has_content(folder: Path) -> bool:
    # Desktops and network file systems add hidden files to a folder that a job has written.
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _delete(folder: Path) -> None:
    """Delete a folder if it exists. Raise an error if a file stays: the new run would use it."""
    if folder.exists():
        shutil.rmtree(folder)
