"""The options and the output folder of `bge-rerank rank --ray`. Nothing here needs Ray."""

from __future__ import annotations

import shutil
import socket
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bge_rerank_integrations.cli import rank as rank_module
from bge_rerank_integrations.cli.app import main
from bge_rerank_integrations.cli.jobs.folder_job import FolderJob
from bge_rerank_integrations.cli.jobs.job_record import record_path
from bge_rerank_integrations.errors import DatasetError

SETTINGS = {"model": "embedded", "top_n": None}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def start(job: FolderJob) -> None:
    assert not job.is_complete()
    job.begin()


def write_rows(job: FolderJob, output: Path) -> None:
    for folder in (job.checkpoint, output):
        folder.mkdir()
        (folder / "rows.jsonl").touch()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that receives (address, source, output) of each job."""
    jobs: list[Any] = []

    def record(_: Any, source: str, output: Path, on_ray: Any, **__: Any) -> None:
        jobs.append((on_ray.address, source, output.name))

    monkeypatch.setattr(rank_module, "rank_on_ray", record)
    return jobs


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["--ray", "in", "-o", "out"], ""),
        (["--ray", "-o", "out", "in"], ""),
        (["in", "-o", "out", "--ray"], ""),
        (["--ray", "auto", "in", "-o", "out"], "auto"),
        (["--ray", "10.0.0.1:6379", "in", "-o", "out"], "10.0.0.1:6379"),
        (["in", "--ray", "ray://head:10001", "-o", "out"], "ray://head:10001"),
        (["--ray=head:6379", "in", "-o", "out"], "head:6379"),
    ],
)
def test_the_address_can_be_left_out(
    arguments: list[str], address: str, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    result = run("rank", *arguments)
    assert result.exit_code == 0, result.output
    assert asked == [(address, "in", "out")]


def test_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in (
        (["rank", tmp_path / "in"], "folders need --ray"),
        (["rank", tmp_path / "file", "-o", tmp_path / "in"], "folders need --ray"),
        (["rank", "--num-actors", 2, tmp_path / "file"], "--num-actors can only be used with --ray"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_folders_are_checked_before_ray_starts(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    (tmp_path / "file").touch()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").touch()
    (tmp_path / "both" / "b.parquet").touch()
    for arguments, message in (
        (["--ray", tmp_path / "file", "-o", tmp_path / "out"], "--ray reads a folder"),
        (["--ray", tmp_path / "both"], "--ray writes a folder"),
        (["--ray", tmp_path / "both", "-o", tmp_path / "out"], "both JSONL and Parquet files"),
    ):
        result = run("rank", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")

    calls: list[None] = []

    def refuse(**_: Any) -> None:
        calls.append(None)
        raise ConnectionError("CANARY")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    (tmp_path / "a.jsonl").write_text("{}")
    output = tmp_path.with_name("out")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for listens in (False, True):
            if listens:
                server.listen()
            result = run("rank", "--ray", address, "--model", "embedded", tmp_path, "-o", output)
            assert result.exit_code == 2
            assert f"cannot connect to a Ray cluster at '{address}'" in " ".join(result.output.split())
            assert "CANARY" not in result.output
            assert len(calls) == listens
    assert not record_path(output).exists()


def test_a_job_is_complete_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    output = tmp_path / "out"
    with FolderJob(output, SETTINGS, [file]) as job:
        start(job)
        assert not job.is_resumed
        job.checkpoint.mkdir()
        (job.checkpoint / "rows.parquet").touch()
        output.mkdir()
        (output / "rows.jsonl").touch()
    with FolderJob(output, SETTINGS, [file]) as job:
        start(job)
        assert job.is_resumed
        with pytest.raises(DatasetError, match="another process"), FolderJob(output, SETTINGS, [file]):
            pass
        job.finish()
    assert not job.checkpoint.exists()
    with FolderJob(output, SETTINGS, [file]) as job:
        assert job.is_complete()
    with FolderJob(output, SETTINGS, [file], overwrite=True) as job:
        start(job)
    assert not output.exists()


def test_a_job_starts_over_if_its_output_was_deleted(tmp_path: Path) -> None:
    file, output = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text("{}")
    for _ in range(2):
        with FolderJob(output, SETTINGS, [file]) as job:
            start(job)
            assert not job.is_resumed
            write_rows(job, output)
        shutil.rmtree(output)


def test_the_checkpoint_of_a_deleted_output_is_not_used(tmp_path: Path) -> None:
    file, output = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text("{}")
    with FolderJob(output, SETTINGS, [file]) as job:
        start(job)
        job.checkpoint.mkdir()
        (job.checkpoint / "rows.parquet").touch()
    output.mkdir()
    (output / ".DS_Store").touch()  # a hidden file is no output
    with FolderJob(output, SETTINGS, [file]) as job:
        start(job)
        assert not job.is_resumed
        job.checkpoint.mkdir()
        (job.checkpoint / "rows.parquet").touch()
    shutil.rmtree(output)
    record_path(output).unlink()
    with FolderJob(output, SETTINGS, [file]) as job, pytest.raises(DatasetError, match="left from another"):
        job.is_complete()
    assert job.checkpoint.exists()
    with FolderJob(output, SETTINGS, [file], overwrite=True) as job:
        start(job)
    assert not job.checkpoint.exists()


@pytest.mark.parametrize("lost", ["checkpoint", "_SUCCESS"])
def test_an_output_whose_rows_are_unknown_is_not_resumed(lost: str, tmp_path: Path) -> None:
    file, output = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text("{}")
    with FolderJob(output, SETTINGS, [file]) as job:
        start(job)
        write_rows(job, output)
        if lost == "checkpoint":
            shutil.rmtree(job.checkpoint)
        else:
            job.finish()
            (output / "_SUCCESS").unlink()
    with FolderJob(output, SETTINGS, [file]) as job, pytest.raises(DatasetError, match="--overwrite"):
        job.is_complete()
    with FolderJob(output, SETTINGS, [file], overwrite=True) as job:
        start(job)
    assert not output.exists()


def test_a_complete_job_reports_its_problem_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    for problem in ("the input is empty", ""):
        output = tmp_path / f"out {problem}"
        with FolderJob(output, SETTINGS, [tmp_path / "a.jsonl"]) as job:
            start(job)
            job.finish(problem)
        with FolderJob(output, SETTINGS, [tmp_path / "a.jsonl"]) as job:
            assert job.is_complete()
            assert job.problem == problem


@pytest.mark.parametrize("deleted", [0, 1])
def test_overwriting_that_was_killed_is_not_resumed(
    deleted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text("{}")
    with FolderJob(output, SETTINGS, [file]) as job:
        start(job)
        write_rows(job, output)
    rmtree, calls = shutil.rmtree, count()

    def killed(*args: Any, **options: Any) -> None:
        if next(calls) == deleted:
            raise KeyboardInterrupt
        rmtree(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt), FolderJob(output, SETTINGS, [file], overwrite=True) as job:
            job.begin()
    with FolderJob(output, SETTINGS, [file]) as job, pytest.raises(DatasetError, match="--overwrite"):
        job.is_complete()
    with FolderJob(output, SETTINGS, [file], overwrite=True) as job:
        start(job)
    assert not output.exists()
    assert not job.checkpoint.exists()


@pytest.mark.parametrize("change", ["settings", "input"])
def test_a_job_with_other_settings_is_refused(change: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    with FolderJob(tmp_path / "out", SETTINGS, [file]) as job:
        job.begin()
    settings = {**SETTINGS, "top_n": 3} if change == "settings" else SETTINGS
    if change == "input":
        file.write_text("{} ")
    name = "top_n" if change == "settings" else "inputs"
    with FolderJob(tmp_path / "out", settings, [file]) as job, pytest.raises(DatasetError, match=name):
        job.is_complete()


def test_folders_of_others_are_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "in" / "a.jsonl"
    file.parent.mkdir()
    file.write_text("{}")
    with pytest.raises(DatasetError, match="contains the input"):
        FolderJob(tmp_path / "in", SETTINGS, [file])
    with pytest.raises(DatasetError, match="is a file"):
        FolderJob(file, SETTINGS, [])
    other = tmp_path / "other"
    other.mkdir()
    (other / ".precious").touch()
    for overwrite in (False, True):
        with (
            FolderJob(other, SETTINGS, [file], overwrite=overwrite) as job,
            pytest.raises(DatasetError, match="is not empty"),
        ):
            job.is_complete()
    assert (other / ".precious").exists()
    (tmp_path / "out.job.json").write_text("damaged")
    with FolderJob(tmp_path / "out", SETTINGS, [file]) as job, pytest.raises(DatasetError, match="damaged"):
        job.is_complete()
