"""`bge-rerank rank --ray` on folders."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("ray", reason="needs the extra `ray`")

import pyarrow as pa
import pyarrow.parquet as pq
from ray.exceptions import RayError, RayTaskError

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.cli.app import main
from bge_rerank_integrations.cli.jobs.raw_lines import rank_raw_lines
from bge_rerank_integrations.ray.actors import ActorOptions
from bge_rerank_integrations.ray.folders import Line, ResultLine, rank_jsonl_folder
from tests.support.tolerances import LOGIT_TOLERANCE

torch = pytest.importorskip("torch")
TOLERANCE = LOGIT_TOLERANCE[torch.float32]
QUERY = "what is a panda?"
CANARY = "CANARY-TEXT"
pytestmark = pytest.mark.usefixtures("cluster")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    return " ".join(text.split())


def request(number: int) -> dict[str, Any]:
    return {
        "id": number,
        "query": QUERY,
        "passages": ["hi", {"id": f"p{number}", "title": "Panda", "text": f"a bear {number}"}],
    }


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture
def on(checkpoint: Path) -> list[str]:
    return ["--model", str(checkpoint), "--device", "cpu"]


def test_a_folder_of_jsonl_files(on: list[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    (source / "_ignored.jsonl").write_text("not a request")
    (source / "c.jsonl.gz").write_bytes(b"compressed")
    first = [json.dumps(request(number)) for number in range(20)]
    (source / "a.jsonl").write_text("\ufeff" + "\n".join([*first, "", f"{{{CANARY}", ""]), encoding="utf-8")
    second = json.dumps({"query": QUERY, "passages": [5]}).encode()
    (source / "sub" / "b.NDJSON").write_bytes(b"\xff\n" + second + b"\n" + first[0].encode())
    result = run("rank", "--ray", source, "-o", output, "--rows-per-block", 8, "--return-texts", *on)
    assert result.exit_code == 0, result.output
    assert "21 request(s) ranked; 3 malformed." in result.output
    assert "Files that are not read: 1, such as c.jsonl.gz." in flat(result.stderr)
    rows = {(row.pop("file"), row["line"]): row for row in read_rows(output)}
    assert sorted(rows) == [
        *(("a.jsonl", line) for line in [*range(1, 21), 22]),
        *(("sub/b.NDJSON", line) for line in (1, 2, 3)),
    ]
    assert rows["a.jsonl", 22]["error"] == "not valid JSON"
    assert rows["sub/b.NDJSON", 1]["error"] == "not UTF-8"
    assert "`passages[0]` is neither" in rows["sub/b.NDJSON", 2]["error"]

    single = tmp_path / "single.jsonl"
    (tmp_path / "requests.jsonl").write_text("\n".join(first), encoding="utf-8")
    assert run("rank", tmp_path / "requests.jsonl", "-o", single, "--return-texts", *on).exit_code == 0
    for line in single.read_text(encoding="utf-8").splitlines():
        expected = json.loads(line)
        found = rows["a.jsonl", expected["line"]]
        assert [found["results"][at].pop("score") for at in range(len(found["results"]))] == pytest.approx(
            [expected["results"][at].pop("score") for at in range(len(expected["results"]))], abs=TOLERANCE
        )
        assert found == expected

    assert (output / "_SUCCESS").exists()
    assert not (tmp_path / "out.checkpoint").exists()
    again = run("rank", "--ray", source, "-o", output, "--return-texts", "--num-threads", 1, *on)
    assert again.exit_code == 0
    assert "is already complete" in flat(again.output)
    other = run("rank", "--ray", source, "-o", output, "--top-n", 1, *on)
    assert other.exit_code == 1
    assert "other settings (return_texts, --top-n)" in flat(other.output)


def test_a_folder_of_parquet_files(on: list[str], checkpoint: Path, scorer: Scorer, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    rows = [{"q": QUERY, "texts": ["hi", f"a bear {at}"], "number": at} for at in range(30)]
    rows[3]["q"] = None
    for at in (0, 15):
        pq.write_table(
            pa.Table.from_pylist(rows[at : at + 15]), source / f"{at}.{'PARQUET' if at else 'parquet'}"
        )
    arguments = ["rank", "--ray", source, "-o", output, "--query-column", "q", "--passages-column", "texts"]
    result = run(*arguments, "--rows-per-block", 10, *on)
    assert result.exit_code == 0, result.output
    assert "29 request(s) ranked; 1 malformed." in result.output
    found = pq.read_table(output).to_pylist()
    assert sorted(row["number"] for row in found) == list(range(30))
    assert len({row["row_id"] for row in found}) == 30
    for row in found:
        if row["number"] == 3:
            assert (row["indices"], row["error"]) == (None, "the query must be a string, not NoneType")
            continue
        expected = scorer.rank(QUERY, rows[row["number"]]["texts"])
        assert row["indices"] == [each.index for each in expected]
        assert row["scores"] == pytest.approx([each.score for each in expected], abs=TOLERANCE)
    missing = run(*arguments[:-1], "nonsense", "--overwrite", *on)
    assert missing.exit_code == 2
    assert "no column ['nonsense']" in flat(missing.output)
    assert len(pq.read_table(output)) == 30, "a job that cannot start must not delete the output"
    strict = run(*arguments, "--overwrite", "--strict", *on)
    assert strict.exit_code == 2
    assert "the query must be a string" in flat(strict.output)


def stop_once(scorer: Scorer, lines: Sequence[Line], *, folder: Path, last: int) -> list[ResultLine]:
    """Rank lines, and record which ones. The block with the last line fails the first time."""
    numbers = [line.number for line in lines]
    if last in numbers and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        raise RuntimeError("stopped")
    with (folder / "scored").open("a") as file:
        file.writelines(f"{number}\n" for number in numbers)
    return rank_raw_lines(scorer, lines, top_n=None, threshold=None, return_texts=False, strict=False)


def test_a_job_that_was_stopped_is_resumed(checkpoint: Path, tmp_path: Path) -> None:
    source, output, state = tmp_path / "in", tmp_path / "out", tmp_path / "state"
    source.mkdir()
    state.mkdir()
    file = source / "a.jsonl"
    file.write_text("\n".join(json.dumps(request(number)) for number in range(400)))

    def rank() -> Any:
        return rank_jsonl_folder(
            [file],
            source,
            output,
            ScorerConfig(model=checkpoint, device="cpu"),
            partial(stop_once, folder=state, last=400),
            actors=ActorOptions(rows_per_block=10, concurrent_calls=1),
            checkpoint=tmp_path / "out.checkpoint",
        )

    with pytest.raises(RayError):
        rank()
    num_saved = len(read_rows(output))
    assert 0 < num_saved < 400
    (state / "scored").unlink()
    written = rank()
    assert sorted(row["line"] for row in read_rows(output)) == list(range(1, 401))
    scored = [int(line) for line in (state / "scored").read_text().splitlines()]
    # A block that was written but not yet recorded when the job stopped is deleted and scored again.
    assert len(scored) == written.num_rows <= 400 - num_saved + 10
    assert len(set(scored)) == len(scored)


def test_strict_and_empty_input(on: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    assert run("rank", "--ray", source, "-o", tmp_path / "out", *on).exit_code == 3
    (source / "a.jsonl").write_text(json.dumps(request(1)) + f"\n{{{CANARY}\n")
    strict = run("rank", "--ray", source, "-o", tmp_path / "out", "--strict", *on)
    assert strict.exit_code == 3
    assert strict.stderr.endswith("Error: a.jsonl, line 2: not valid JSON\n")
    assert CANARY not in strict.output
    (source / "a.jsonl").write_text("nonsense\n")
    for _ in range(2):
        useless = run("rank", "--ray", source, "-o", tmp_path / "out2", *on)
        assert useless.exit_code == 3
        assert "no row of the input is a request" in flat(useless.output)


def test_an_output_folder_inside_the_input_is_refused(on: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(request(1)))
    for output in (tmp_path, tmp_path / "out"):
        result = run("rank", "--ray", tmp_path, "-o", output, *on)
        assert result.exit_code == 2
        assert "the output folder lies inside SOURCE" in flat(result.stderr)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", ""])
def test_ray_client_is_refused_before_anything_is_written(
    address: str, on: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data would fail later, with an error that asks to report it."""
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:2")
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps(request(1)))
    result = run("rank", "--ray", *[address] * bool(address), source, "-o", output, *on)
    assert result.exit_code == 2
    assert "do not run over Ray Client" in flat(result.stderr)
    assert not output.exists()
    assert not (tmp_path / "out.job.json").exists()


def test_an_output_folder_in_a_loop_of_links_is_refused(on: list[str], tmp_path: Path) -> None:
    source, loop = tmp_path / "in", tmp_path / "loop"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps(request(1)))
    loop.symlink_to(loop)
    result = run("rank", "--ray", source, "-o", loop, *on)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "not a traceback"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b"not Parquet", "b.parquet is not a Parquet file"),
        ({"query": [QUERY], "id": [1]}, "b.parquet has no column ['passages']"),
        ({"query": [QUERY], "passages": [["a"]], "id": ["1"]}, "the files have columns of different types"),
        (
            {"query": [QUERY], "passages": [["a"]], "error": [""]},
            "b.parquet already has the column ['error']",
        ),
    ],
)
def test_parquet_files_are_checked_before_any_row_is_ranked(
    second: Any, message: str, on: list[str], tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"query": [QUERY], "passages": [["a"]], "id": [1]}), source / "a.parquet")
    if isinstance(second, bytes):
        (source / "b.parquet").write_bytes(second)
    else:
        pq.write_table(pa.table(second), source / "b.parquet")
    result = run("rank", "--ray", source, "-o", tmp_path / "out", *on)
    assert (result.exit_code, message in flat(result.stderr)) == (2, True), result.stderr
    assert result.stderr.count("Error:") == 1
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_columns_whose_values_do_not_fit_together(on: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, identifier in (("a", 2**53 + 1), ("b", 0.5)):
        row = {"query": [QUERY], "passages": [["a"]], "id": [identifier]}
        pq.write_table(pa.table(row), source / f"{name}.parquet")
    result = run("rank", "--ray", source, "-o", tmp_path / "out", *on)
    assert result.exit_code == 2
    assert "give each column the same type" in flat(result.stderr)
    assert str(2**53 + 1) not in result.stderr


def test_a_model_that_cannot_be_loaded_ends_the_job_with_its_error(
    on: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps(request(1)))
    result = run("rank", "--ray", source, "-o", tmp_path / "out", *on, "--sha256", "0" * 64)
    assert result.exit_code == 1
    assert "which is not the expected one" in flat(result.stderr)
    assert result.stderr.count("\n") < 10


def test_a_full_disk_is_named(
    on: list[str], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps(request(1)))
    full = OSError(
        errno.ENOSPC, "No space left on device", "Failed to apply UDF transform after 1/1 attempts"
    )

    def fail(*_: Any, **__: Any) -> None:
        raise RayTaskError("Write", "traceback", full).as_instanceof_cause()

    monkeypatch.setattr("ray.data.Dataset.write_datasink", fail)
    result = run("rank", "--ray", source, "-o", tmp_path / "out", *on)
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: output: No space left on device\n")


def test_linked_folders_are_not_read_silently(on: list[str], tmp_path: Path) -> None:
    source, other = tmp_path / "in", tmp_path / "other"
    for folder in (source, other):
        folder.mkdir()
        (folder / "a.jsonl").write_text(json.dumps(request(1)))
    (source / "linked").symlink_to(other)
    (source / "b.jsonl").symlink_to(other / "a.jsonl")
    result = run("rank", "--ray", source, "-o", tmp_path / "out", *on)
    assert result.exit_code == 0, result.output
    assert "not read: 1, such as linked" in flat(result.stderr)
    assert {row["file"] for row in read_rows(tmp_path / "out")} == {"a.jsonl", "b.jsonl"}


def test_columns_of_partition_folders_are_not_lost_silently(on: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in" / "lang=en"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"query": [QUERY], "passages": [["a"]]}), folder / "a.parquet")
    result = run("rank", "--ray", tmp_path / "in", "-o", tmp_path / "out", *on)
    assert result.exit_code == 2
    assert "partitioned into folders such as lang=en" in flat(result.stderr)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are always UTF-8 there")
@pytest.mark.parametrize("name", [b"in/a\xff.jsonl", b"in\xff/a.parquet"])
def test_a_path_that_is_not_utf_8_is_refused(name: bytes, on: list[str], tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(name)
    file.parent.mkdir()
    file.write_text(json.dumps(request(1)))
    result = run("rank", "--ray", file.parent, "-o", tmp_path / "out", *on)
    assert result.exit_code == 2
    assert "\ufffd" in result.stderr
    assert "is not UTF-8" in flat(result.stderr)
