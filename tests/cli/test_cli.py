"""The commands of the command line: output, messages and exit statuses."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from bge_rerank_integrations import Scorer, __version__
from bge_rerank_integrations.cli.app import main
from bge_rerank_integrations.cli.console import WIDTH
from bge_rerank_integrations.cli.stdlib_docs import QUESTIONS, read_stdlib_docs
from bge_rerank_integrations.config import DEFAULT_MODEL, ScorerConfig
from bge_rerank_integrations.engine.cpu.int8_support import int8_obstacle, is_faster_in_int8
from bge_rerank_integrations.engine.describe import describe_precision
from bge_rerank_integrations.evaluation import reference_scores
from bge_rerank_integrations.evaluation.reference_scores import Reference
from bge_rerank_integrations.runtime import warn_once
from tests.support.attention import FLOAT32_ON_CPU

REQUEST = {"id": "q", "query": "what is a panda?", "passages": ["A bear.", "A car.", "A house."]}
COMMANDS = ("demo", "rank", "rerank-run", "eval", "serve", "info", "check")


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def flat(text: str) -> str:
    """Undo the wrapping of messages."""
    return " ".join(text.split())


@pytest.fixture
def on(checkpoint: Path) -> list[str]:
    """Return the options that choose the small checkpoint."""
    return ["--model", str(checkpoint), "--device", "cpu", "--dtype", "float32"]


def test_help_shows_every_command_with_an_example() -> None:
    overview = run("--help").output
    assert "Exit status" in overview
    for command in COMMANDS:
        assert command in overview
        shown = run(command, "-h")
        assert shown.exit_code == 0
        assert f"\n  bge-rerank {command} " in shown.output.replace("demo\n", "demo \n").replace(
            "info\n", "info \n"
        )
    assert __version__ in run("--version").output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["rank", "--dtype", "int3"], 2, "Invalid value for '--dtype'"),
        (["rank", "--max-length", "3"], 2, "--max-length must be an integer from"),
        (["rank", "--device", "tpu"], 2, "device must be"),
        (["rank", "--devices", "cuda:0,cuda:0"], 2, "twice"),
        (["rank", "--devices", ","], 2, "devices[0] is empty"),
        (["rank", "--devices", "cuda:0, "], 2, "devices[1] is empty"),
        (["rank", "--model", ".", "--revision", "v1"], 2, "is a local folder, which has no revisions"),
        (["rank", "/no/such/file"], 2, "does not exist"),
        (["eval", "/no/such/folder"], 2, "does not exist"),
        (["rank", "--model", "/no/such/model"], 1, "model folder '/no/such/model' does not exist"),
        (["rank", "--threshold", "nan"], 2, "threshold"),
        (["rank", "-o", "/no/such/folder/out.jsonl"], 2, "folder '/no/such/folder' does not exist"),
        (["rank", "--model", "~nobody/model"], 1, "does not exist"),
        (["check", "--model", "BAAI/bge-m3"], 2, "no scores are known for 'BAAI/bge-m3'"),
        (["rank", "--model", "embedded", "--revision", "v1"], 2, "has no revisions"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_an_error_is_a_message_and_a_status(arguments: list[str], status: int, message: str) -> None:
    result = run(*arguments, stdin=json.dumps(REQUEST))
    assert result.exit_code == status
    assert message in flat(result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.output


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_reported_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("rank", "-o", tmp_path / "out.jsonl", "--model", "/no/such/model", stdin="{}")
    tmp_path.chmod(0o700)
    assert result.exit_code == 2
    assert "is not writable" in flat(result.stderr)


def test_without_a_hub_the_embedded_model_is_offered() -> None:
    result = run("rank", stdin=json.dumps(REQUEST))
    assert result.exit_code == 1
    message = flat(result.stderr)
    assert "--model embedded" in message
    assert "--cache-folder" in message
    assert "--local-files-only" in message
    assert not {"cache_folder", "local_files_only"} & set(message.replace("=", " ").split())


def test_rank_reads_stdin_and_writes_stdout(on: list[str], scorer: Scorer) -> None:
    result = run("rank", "--top-n", 2, *on, stdin=json.dumps(REQUEST) + "\n{\n")
    assert result.exit_code == 0
    [row] = map(json.loads, result.stdout.splitlines())
    expected = scorer.rank("what is a panda?", ["A bear.", "A car.", "A house."], top_n=2)
    assert [found["index"] for found in row["results"]] == [passage.index for passage in expected]
    assert "line 2: not valid JSON; skipped" in result.stderr
    assert "1 request(s), 3 pair(s) ranked; 1 malformed line(s) skipped." in result.stderr


def test_rank_normalizes_on_demand(on: list[str]) -> None:
    raw = json.loads(run("rank", *on, stdin=json.dumps(REQUEST)).stdout)
    normalized = json.loads(run("rank", "--normalize", *on, stdin=json.dumps(REQUEST)).stdout)
    assert [found["index"] for found in raw["results"]] == [f["index"] for f in normalized["results"]]
    assert all(0 < found["score"] < 1 for found in normalized["results"])
    assert raw["results"][0]["score"] != normalized["results"][0]["score"]


def test_rank_ends_with_the_truncations_and_the_precision(on: list[str]) -> None:
    request = {"query": "panda", "passages": ["bear " * 600, "A car."]}
    result = run("rank", *on, stdin=json.dumps(request))
    assert "1 passage(s) were cut to fit --max-length 512" in flat(result.stderr)
    assert result.stderr.splitlines()[-1].startswith("Ran on cpu in float32")
    windows = run("rank", "--long-passages", "windows", *on, stdin=json.dumps(request))
    assert "were cut" not in windows.stderr
    assert json.loads(windows.stdout)["results"] != json.loads(result.stdout)["results"]


def test_queries_that_are_cut_are_counted(on: list[str]) -> None:
    request = {"query": "panda " * 600, "passages": ["A bear.", "A car."]}
    result = run("rank", *on, stdin=json.dumps(request))
    assert "Queries that were cut to 384 tokens: 1." in flat(result.stderr)
    assert "passage(s) were cut" not in flat(result.stderr)


def test_a_blank_passage_comes_last_and_is_marked(on: list[str], folder: Path) -> None:
    request = {"query": "panda", "passages": ["", "A bear.", " \n", "A car."]}
    results = json.loads(run("rank", *on, stdin=json.dumps(request)).stdout)["results"]
    assert [found["index"] for found in results][2:] == [0, 2]
    assert [found.get("blank") for found in results] == [None, None, True, True]
    refused = run("rank", "--blank-passages", "refuse", *on, stdin=json.dumps(request))
    assert refused.exit_code == 3
    assert "line 1: passage 0 is blank; leave it out, or set --blank-passages last" in flat(refused.stderr)
    trec = folder / "first.trec"
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "empty", "text": ""}) + "\n")
    trec.write_text("q1 Q0 empty 1 3.0 x\nq1 Q0 a 2 2.0 x\n")
    rows = [line.split() for line in run("rerank-run", trec, folder, *on).stdout.splitlines()]
    assert [row[2] for row in rows] == ["a", "empty"]


def test_warnings_and_errors_name_options(on: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn_once, "_logged", {})
    request = {"query": "panda " * 600, "passages": ["", "A bear."]}
    warned = run("rank", *on, stdin=json.dumps(request)).stderr
    assert max(map(len, warned.splitlines())) <= WIDTH
    assert "1 of the 2 passages of a request are blank." in flat(warned)
    assert "Set --blank-passages refuse to get an error instead." in flat(warned)
    assert "A query has more than --query-max-length 384 tokens" in flat(warned)
    assert "or set --query-truncation-side to choose which end" in flat(warned)
    outside = run("rank", "--threshold", 2, "--normalize", *on, stdin=json.dumps(request)).stderr
    assert "with --normalize scores lie between 0 and 1; without --normalize they are raw" in flat(outside)


def test_a_faster_precision_is_named_with_its_option(on: list[str]) -> None:
    stderr = flat(run("rank", *on, stdin=json.dumps(REQUEST)).stderr)
    last = stderr.rpartition("ranked. ")[2]
    assert last.startswith("Ran on cpu in float32")
    assert ("--dtype int8 is faster on this machine" in last) == is_faster_in_int8()
    dtype = describe_precision(ScorerConfig(device="cpu")).dtype
    default = flat(run("rank", *on, "--dtype", "auto", stdin=json.dumps(REQUEST)).stderr)
    assert f"Ran on cpu in {dtype}" in default


@pytest.mark.parametrize("command", ["rank", "eval"])
def test_without_the_extra_int8_the_last_line_says_how_to_install_it(
    checkpoint: Path, folder: Path, command: str
) -> None:
    code = (
        "import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
        "from bge_rerank_integrations.cli.app import main; main(sys.argv[1:])"
    )
    source = [str(folder)] if command == "eval" else []
    arguments = [command, *source, "--model", str(checkpoint), "--device", "cpu", "--dtype", "float32"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=json.dumps(REQUEST),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    text = flat(ran.stdout + ran.stderr)
    command_to_install = 'needs `pip install "bge-rerank-integrations[int8]"`'
    is_faster = torch.cpu._is_vnni_supported() or torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert (command_to_install in text) == is_faster


@pytest.mark.parametrize("setting", ["query", "passage"])
def test_instructions_reach_the_model(on: list[str], checkpoint: Path, setting: str) -> None:
    instruction = {f"{setting}_instruction": "find this: "}
    request = {"query": "what is a panda?", "passages": ["A bear."]}
    result = run("rank", f"--{setting}-instruction", "find this: ", *on, stdin=json.dumps(request))
    [row] = json.loads(result.stdout)["results"]
    with Scorer(checkpoint, device="cpu", dtype="float32", **instruction) as scorer:  # type: ignore[arg-type]
        assert row["score"] == pytest.approx(scorer.score([("what is a panda?", "A bear.")])[0], abs=1e-5)
    plain = json.loads(run("rank", *on, stdin=json.dumps(request)).stdout)["results"][0]
    assert plain["score"] != row["score"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(json.dumps(REQUEST).encode()), "the input is gzip, not JSONL"),
        (b"PAR1\x15\x04", "the input is Parquet, not JSONL"),
        (json.dumps(REQUEST).encode("utf-16"), "the input is UTF-16, not UTF-8; convert it first"),
        (json.dumps(REQUEST).encode("utf-16-be"), "the input is UTF-16"),
        (b"query,passage\n" + b"what,a bear\n" * 500, "it looks like CSV"),
        (json.dumps([REQUEST]).encode(), "it looks like a JSON array"),
        (json.dumps([REQUEST], indent=1).encode(), "it looks like a JSON array"),
        (json.dumps(REQUEST, indent=1).encode(), "it looks like JSON over several lines"),
        (b'{"_id": "q", "text": "a query"}\n' * 30, "line 1: `query` is missing"),
        (b"", "the input is empty"),
        (b"\n\n", "the input is empty"),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_an_input_without_a_request_is_a_failure_every_time(
    on: list[str], tmp_path: Path, content: bytes, message: str, piped: bool
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    for _ in range(2):
        result = run("rank", "-" if piped else source, "-o", output, *on, stdin=content)
        assert result.exit_code == 3
        assert message in flat(result.stderr)
        assert len(result.stderr.splitlines()) < 30
        assert not output.exists()
    source.write_text(json.dumps(REQUEST))
    good = run("rank", "-" if piped else source, "-o", output, *on, stdin=json.dumps(REQUEST))
    assert good.exit_code == 0, good.stderr
    assert len(output.read_text().splitlines()) == 1


def test_a_finished_file_stays_if_the_new_input_holds_no_request(on: list[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(REQUEST))
    assert run("rank", source, "-o", output, *on).exit_code == 0
    written = output.read_text()
    source.write_text("nonsense\n")
    assert run("rank", source, "-o", output, "--overwrite", *on).exit_code == 3
    assert output.read_text() == written
    assert "already complete" not in flat(run("rank", source, "-o", output, *on).stderr)


def test_malformed_lines_are_named_up_to_a_limit_and_all_counted(on: list[str]) -> None:
    result = run("rank", *on, stdin=json.dumps(REQUEST) + "\n" + "nonsense\n" * 1000)
    assert result.exit_code == 0
    assert result.stderr.count("skipped\n") == 20
    assert result.stderr.count("Further malformed lines are counted but not listed.") == 1
    assert "; 1000 malformed line(s) skipped." in flat(result.stderr)


def test_texts_and_titles_come_back(on: list[str], tmp_path: Path) -> None:
    passages = ["A car.", {"_id": "d1", "title": "Panda", "text": "A bear."}]
    request = {"query": "panda", "documents": passages}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(request))
    assert run("rank", source, "-o", output, "--return-texts", *on).exit_code == 0
    results = {found["index"]: found for found in json.loads(output.read_text())["results"]}
    assert {key: results[1][key] for key in ("id", "title", "text")} == {
        "id": "d1",
        "title": "Panda",
        "text": "A bear.",
    }
    assert set(results[0]) == {"index", "score", "text"}
    without = run("rank", source, "-o", output, *on)
    assert "other settings (return_texts)" in flat(without.stderr)


def test_rank_strict_ends_with_status_3(on: list[str]) -> None:
    result = run("rank", "--strict", *on, stdin=json.dumps(REQUEST) + "\n{\n")
    assert result.exit_code == 3
    assert "line 2: not valid JSON" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_rank_to_a_file_is_done_once(on: list[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(REQUEST) + "\n")
    first = run("rank", source, "-o", output, *on)
    assert first.exit_code == 0
    assert first.stdout == ""
    written = output.read_text()
    again = run("rank", source, "-o", output, "--local-files-only", *on)
    assert again.exit_code == 0
    assert "already complete" in flat(again.stderr)
    for name in ("--top-n", "--num-threads"):
        other = run("rank", source, "-o", output, name, 1, *on)
        assert other.exit_code == 1
        assert f"other settings ({name})" in flat(other.stderr)
    assert output.read_text() == written
    anew = run("rank", source, "-o", output, "--top-n", 1, "--overwrite", *on)
    assert anew.exit_code == 0
    assert len(json.loads(output.read_text())["results"]) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a BEIR folder of three passages and two queries."""
    texts = {"a": "pandas eat bamboo", "b": "cars need fuel", "c": "bears eat fish and berries"}
    queries = {"q1": "what do pandas eat", "q2": "what do bears eat"}
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in texts.items())
    )
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in queries.items())
    )
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\nq2\tc\t2\n")
    return tmp_path


def test_nothing_is_written_over_an_input(on: list[str], folder: Path) -> None:
    trec = folder / "first.trec"
    trec.write_text("q1 Q0 a 1 3.0 bm25\n")
    for output in (trec, folder / "corpus.jsonl"):
        before = output.read_text()
        assert run("rerank-run", trec, folder, "-o", output, *on).exit_code == 2
        assert output.read_text() == before
    # It may also hold the rows of an interrupted `rank`.
    partial = trec.rename(folder / "first.trec.partial")
    assert run("rerank-run", partial, folder, "-o", trec, *on).exit_code == 0
    assert partial.read_text() == "q1 Q0 a 1 3.0 bm25\n"
    assert set(folder.glob("first.trec*")) == {trec, partial}
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    refused = run("rerank-run", partial, folder, "-o", pipe, *on)
    assert refused.exit_code == 1
    assert "is not a regular file" in flat(refused.stderr)
    assert pipe.is_fifo()
    link, target = folder / "link.trec", folder / "target.trec"
    link.symlink_to(target)
    assert run("rerank-run", partial, folder, "-o", link, *on).exit_code == 0
    assert link.is_symlink()
    assert target.read_text().startswith("q1 Q0 a 1")
    loop = folder / "loop"
    loop.symlink_to(loop)
    for refused in (
        run("rerank-run", partial, folder, "-o", loop, *on),
        run("rank", folder / "corpus.jsonl", "-o", loop, *on),
    ):
        assert refused.exit_code == 1
        assert isinstance(refused.exception, SystemExit), "not a traceback"
    failed = run("rerank-run", partial, folder, "-o", folder / ("x" * 250), "--model", "/no/such/model")
    assert failed.exit_code == 1
    assert "name too long" in flat(failed.stderr), "the output is checked before the model"
    result = run("rank", folder / "corpus.jsonl", "-o", folder / "corpus.jsonl", "--overwrite", *on)
    assert result.exit_code == 1
    assert "is the input" in flat(result.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_numbers_are_printed_even_if_the_plot_cannot_be(on: list[str], folder: Path) -> None:
    plot = folder / "plot.png"
    plot.symlink_to("/dev/full")
    result = run("eval", folder, "--plot", plot, *on)
    assert result.exit_code == 1
    assert "No space left on device" in flat(result.stderr)
    assert "nDCG@10" in result.stdout


def test_a_link_into_a_folder_that_does_not_exist_is_refused_before_any_work(folder: Path) -> None:
    plot = folder / "plot.png"
    plot.symlink_to("/no/such/folder/plot.png")
    result = run("eval", folder, "--plot", plot, "--model", "/no/such/model")
    assert result.exit_code == 2
    assert "folder '/no/such/folder' does not exist" in flat(result.stderr)


def test_a_plot_of_an_unknown_format_is_refused_before_any_work(folder: Path) -> None:
    result = run("eval", folder, "--plot", folder / "plot.nonsense", "--model", "/no/such/model")
    assert result.exit_code == 1
    assert "its suffix must be one of" in flat(result.stderr)
    assert result.stdout == ""


def test_rerank_run_gives_a_run_in_the_scorers_order(on: list[str], folder: Path, scorer: Scorer) -> None:
    trec = folder / "first.trec"
    trec.write_text("q1 Q0 a 1 3.0 bm25\nq1 Q0 b 2 2.0 bm25\nq1 Q0 c 3 1.0 bm25\n")
    result = run("rerank-run", trec, folder, "--depth", 2, "--tag", "mine", *on)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    expected = scorer.rank("what do pandas eat", ["pandas eat bamboo", "cars need fuel"])
    assert [row[2] for row in rows] == ["ab"[passage.index] for passage in expected]
    assert [row[3] for row in rows] == ["1", "2"]
    assert [float(row[4]) for row in rows] == pytest.approx([passage.score for passage in expected], abs=1e-5)
    assert {row[5] for row in rows} == {"mine"}
    output = folder / "out.trec"
    assert run("rerank-run", trec, folder, "--depth", 2, "--tag", "mine", "-o", output, *on).exit_code == 0
    assert output.read_text() == result.stdout
    assert run("rerank-run", trec, folder, "--tag", "two words", *on).exit_code == 2


def test_eval_prints_a_table_and_json(on: list[str], folder: Path) -> None:
    table = run("eval", folder, *on)
    assert table.exit_code == 0
    for word in ("nDCG@10", "MRR@10", "MAP", "R@50", "95 % interval", "pairs/s", "First stage: BM25"):
        assert word in table.stdout
    plot = folder / "plot.svg"
    record = json.loads(run("eval", folder, "--json", "--plot", plot, *on).stdout)
    assert record["num_pairs"] == 4  # the passage about cars shares no word with the query about bears
    assert record["before"]["MRR@10"] == 1
    assert set(record["intervals"]["MAP"]) == {"mean", "low", "high"}
    assert {change["query_id"] for change in record["changes"]} == {"q1", "q2"}
    assert "<svg" in plot.read_text(encoding="utf-8")


def test_eval_says_how_many_judged_queries_have_no_text(on: list[str], folder: Path) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q8\ta\t1\nq9\ta\t1\n")
    result = run("eval", folder, *on)
    assert result.exit_code == 0
    assert flat(result.stderr) == "Judged queries without a text in queries.jsonl: 2. They are left out."


def test_eval_says_how_many_relevant_passages_are_missing(on: list[str], folder: Path) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tnowhere\t1\n")
    result = run("eval", folder, "--json", *on)
    assert result.exit_code == 0
    assert flat(result.stderr).startswith(
        "Relevant passages that are not in corpus.jsonl: 1 of 3. They count as"
    )
    assert (json.loads(result.stdout)["split"], json.loads(result.stdout)["run"]) == ("test", None)


def test_eval_says_that_bm25_finds_nothing(folder: Path) -> None:
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "zebra"}\n')
    result = run("eval", folder, "--model", "/no/such/model")
    assert result.exit_code == 1
    assert "BM25 finds nothing" in flat(result.stderr)
    assert "--run" in result.stderr


def test_eval_counts_repeated_judgements_on_one_line(on: list[str], folder: Path) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\ta\t1\nq2\tc\t0\n")
    result = run("eval", folder, *on)
    assert result.exit_code == 0
    assert flat(result.stderr) == (
        "2 judgement(s) repeat an earlier one, 1 with a different grade. The highest grade counts."
    )
    strict = run("eval", folder, "--strict", *on)
    assert strict.exit_code == 1
    assert "line 4: passage judged twice" in flat(strict.stderr)


def test_eval_ends_with_the_truncations_and_the_precision(on: list[str], folder: Path) -> None:
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d", "text": "pandas eat " + "bamboo " * 600}) + "\n")
    result = run("eval", folder, *on)
    assert "2 passage(s) were cut to fit --max-length 512" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Ran on cpu in float32")
    record = json.loads(run("eval", folder, "--json", *on).stdout)
    assert (record["device"], record["dtype"], record["num_truncated"]) == ("cpu", "float32", 2)
    whole = run("eval", folder, "--long-passages", "windows", *on)
    assert "were cut" not in whole.stdout


def test_eval_takes_a_run_as_first_stage(on: list[str], folder: Path) -> None:
    trec = folder / "first.trec"
    trec.write_text("q1 Q0 b 1 3.0 x\nq1 Q0 a 2 2.0 x\nunjudged Q0 a 1 1.0 x\n")
    record = json.loads(run("eval", folder, "--run", trec, "--json", *on).stdout)
    assert record["run"] == str(trec)
    assert record["num_pairs"] == 2
    assert record["before"]["MRR@10"] == pytest.approx((0.5 + 0) / 2)


def test_eval_puts_another_rerankers_run_beside_the_models(on: list[str], folder: Path) -> None:
    first, other = folder / "first.trec", folder / "other.trec"
    first.write_text("q1 Q0 b 1 3.0 x\nq1 Q0 a 2 2.0 x\nq2 Q0 a 1 2.0 x\nq2 Q0 c 2 1.0 x\n")
    # This run puts each relevant passage first. It also has a passage and a query that the first stage lacks.
    other.write_text(
        "q1 Q0 c 1 9 y\nq1 Q0 a 2 8 y\nq1 Q0 b 3 7 y\nq2 Q0 c 1 9 y\nq2 Q0 a 2 8 y\nz Q0 a 1 1 y\n"
    )
    asked = ("eval", folder, "--run", first, "--compare", other, *on)
    table = run(*asked)
    assert table.exit_code == 0, table.stderr
    header = next(line for line in table.stdout.splitlines() if "before" in line)
    assert header.split()[:3] == ["before", "other", "after"]
    record = json.loads(run(*asked, "--json").stdout)
    compared = record["compared"]
    assert compared["name"] == "other"
    assert compared["means"]["MRR@10"] == 1
    assert compared["shares"]["MRR@10"] == pytest.approx(record["after"]["MRR@10"])
    assert compared["intervals"]["MRR@10"]["mean"] == pytest.approx(record["after"]["MRR@10"] - 1)
    compared_table = table.stdout.partition("compared with other")[2]
    row = next(line for line in compared_table.splitlines() if "nDCG@10" in line)
    assert f"{compared['shares']['nDCG@10']:.1%}" in row
    plain = json.loads(run("eval", folder, "--run", first, "--json", *on).stdout)
    assert plain["compared"] is None
    assert plain["after"] == record["after"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "q1 Q0 a 1 9 y\n",
            "the compared run 'other' lacks a passage of the first stage: id 'b', for query 'q1'",
        ),
        ("q2 Q0 a 1 9 y\n", "the compared run 'other' lacks a query of the first stage: id 'q1'"),
        ("q1 Q0 a\n", "other.trec, line 1: not `query-id"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(
    on: list[str], folder: Path, text: str, message: str
) -> None:
    first, other = folder / "first.trec", folder / "other.trec"
    first.write_text("q1 Q0 b 1 3.0 x\nq1 Q0 a 2 2.0 x\n")
    other.write_text(text)
    result = run("eval", folder, "--run", first, "--compare", other, *on)
    assert result.exit_code == 1
    assert message in flat(result.stderr)
    assert result.stdout == ""


def test_info_shows_device_and_precision_with_reasons(on: list[str], checkpoint: Path) -> None:
    auto = flat(run("info", *on, "--dtype", "auto").stdout)
    text = flat(run("info", *on).stdout)
    assert "cpu (chosen)" in text
    assert re.search(r"float32 \(default on a CPU without AMX\)|bfloat16 \(default on a CPU with AMX\)", auto)
    assert "float32 (chosen)" in text
    summary = {
        "tile_attention": "tile_attention (Run this package's own kernel in float32",
        "sdpa_attention": "sdpa_attention (Run scaled_dot_product_attention on each run",
    }
    assert summary[FLOAT32_ON_CPU] in text
    assert re.search(r"cores \((torch's choice|the CPU (quota|affinity) of .*)\)", text)
    assert "1 of" in (threads := run("info", "--num-threads", 1, *on).stdout)
    assert "cores (chosen)" in threads
    record = json.loads(run("info", "--json", *on).stdout)
    assert record["machine"]["attention"] == FLOAT32_ON_CPU
    assert record["model"]["max_length"] == 512
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert record["model"]["num_bytes"] == size
    assert record["versions"]["torch"]


def test_info_shows_the_limits_of_the_model(on: list[str]) -> None:
    result = run("info", *on, "--max-length", 600)
    assert "--max-length 600 is more than the 512 tokens" in flat(result.stdout)
    assert result.exit_code == 1


def test_info_needs_no_model() -> None:
    result = run("info", "--devices", "cpu")
    assert result.exit_code == 0
    assert "cpu (chosen)" in result.stdout
    assert "not on this machine; the first use downloads it from the hub" in flat(result.stdout)
    model = json.loads(run("info", "--json").stdout)["model"]
    assert "error" in model
    assert model["usable"] is True


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_info_of_a_model_that_cannot_be_used_fails(as_json: list[str]) -> None:
    missing = run("info", "--model", "/no/such", *as_json)
    assert missing.exit_code == 1
    assert "not usable: model folder '/no/such' does not exist" in flat(missing.stdout)
    offline = run("info", "--local-files-only", *as_json)
    assert offline.exit_code == 1
    assert "not usable: not on this machine" in flat(offline.stdout)


def test_check_compares_with_published_scores(
    on: list[str], scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = run("check", "--as", "BAAI/bge-reranker-large", *on)
    assert wrong.exit_code == 3
    assert "DISAGREE" in wrong.stdout
    pairs = [("what is a panda?", "A bear."), ("panda", "hi")]
    logits = {pair: score + 0.01 for pair, score in zip(pairs, scorer.score(pairs), strict=True)}
    mine = Reference(source="a test", tolerance=0.1, logits=logits)
    monkeypatch.setitem(reference_scores.PUBLISHED, "mine", mine)
    agreeing = run("check", "--as", "mine", *on)
    assert agreeing.exit_code == 0
    assert "The scores agree" in agreeing.stdout
    record = json.loads(run("check", "--as", "mine", "--json", *on).stdout)
    assert record["agrees"] is True
    assert (record["dtype"], record["source"]) == ("float32", "a test")


def test_check_knows_scores_of_its_default_model(checkpoint: Path) -> None:
    record = json.loads(run("check", "--model", checkpoint, "--as", DEFAULT_MODEL, "--json").stdout)
    assert {pair["passage"][:9]: pair["expected"] for pair in record["pairs"]} == {
        "hi": -8.154,
        "The giant": 6.182,
    }
    assert "issue tracker" in record["source"]
    # Without a hub it gets as far as asking for the model. All tests run with HF_HUB_OFFLINE=1.
    assert "HF_HUB_OFFLINE forbids a download" in flat(run("check").stderr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_embedded_model_passes_its_own_check(dtype: str) -> None:
    if dtype == "int8" and int8_obstacle() is not None:
        pytest.skip("int8 is not available")
    result = run("check", "--model", "embedded", "--device", "cpu", "--dtype", dtype, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["pairs"]) >= 5


def test_the_check_of_the_embedded_model_finds_a_small_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = reference_scores.require_reference("embedded")
    off = {pair: logit + 0.005 for pair, logit in reference.logits.items()}
    monkeypatch.setattr(reference_scores, "_read_golden", lambda: dataclasses.replace(reference, logits=off))
    assert run("check", "--model", "embedded", "--device", "cpu", "--dtype", "float32").exit_code == 3


def test_the_demos_corpus_documents_the_standard_library() -> None:
    docs = read_stdlib_docs()
    assert len(docs) > 3000
    assert docs["textwrap.dedent"].startswith("textwrap.dedent: Remove any common leading whitespace")
    assert "itertools.chain" in docs
    assert not any("._" in name for name in docs)
    assert len(QUESTIONS) == 10


def test_the_demo_answers_a_question_through_both_frameworks(on: list[str]) -> None:
    result = run("demo", *on, "--depth", 5, "remove leading whitespace", "zzzqqq")
    assert result.exit_code == 0
    assert "textwrap.dedent" in result.stdout
    assert "No passage shares a word with this question." in result.stdout
    assert "LangChain and LlamaIndex returned the same order" in result.stdout


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [
        (["demo"], "bm25s", "demo"),
        (["demo"], "langchain_core", "demo"),
        (["demo"], "llama_index.core", "demo"),
        (["eval"], "bm25s", "eval"),
        (["eval"], "ir_measures", "eval"),
        (["eval", "--plot", "x.png"], "matplotlib", "eval"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(
    command: list[str], library: str, extra: str, on: list[str], folder: Path
) -> None:
    # Importing a module that is None in sys.modules raises ImportError.
    code = f"import sys; sys.modules[{library!r}] = None; import runpy\n"
    code += "runpy.run_module('bge_rerank_integrations.cli', run_name='__main__')"
    arguments = [*command, *([str(folder)] if command[0] == "eval" else []), *on]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    assert result.returncode == 1
    assert f'pip install "bge-rerank-integrations[{extra}]"' in result.stderr
    assert "Traceback" not in result.stderr
