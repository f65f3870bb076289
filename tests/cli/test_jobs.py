"""Ranking jobs: every row is written exactly once, even with malformed input and after kills."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.cli.jobs.file_job import FileJob
from bge_rerank_integrations.cli.jobs.rank_lines import Progress, rank_lines
from bge_rerank_integrations.cli.jobs.requests import (
    MalformedInputError,
    MalformedLineError,
    check_format,
    parse_request,
)
from bge_rerank_integrations.errors import DatasetError, InputError, NonFiniteScoreError
from bge_rerank_integrations.evaluation.datasets import read_corpus

REQUEST = {"query": "what is a panda?", "passages": ["A bear.", "A car."]}


def lines(*rows: object) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def rank_all(
    scorer: Scorer, source: Iterable[bytes], **options: Any
) -> tuple[list[Any], list[int], Progress]:
    malformed: list[int] = []
    progress = Progress()
    batches = rank_lines(
        scorer, source, on_malformed=lambda error: malformed.append(error.line), progress=progress, **options
    )
    return [json.loads(row) for rows in batches for row in rows], malformed, progress


def test_a_request_comes_back_with_its_ids_best_first(scorer: Scorer) -> None:
    row = {"id": "q7", "query": "panda", "passages": ["A bear.", {"id": 12, "text": "A car."}]}
    [result], malformed, progress = rank_all(scorer, lines(row))
    assert (result["line"], result["id"], malformed) == (1, "q7", [])
    assert {found["index"]: found.get("id") for found in result["results"]} == {0: None, 1: 12}
    expected = scorer.rank("panda", ["A bear.", "A car."])
    assert [(found["index"], found["score"]) for found in result["results"]] == [
        (passage.index, pytest.approx(passage.score, abs=1e-6)) for passage in expected
    ]
    assert (progress.num_rows, progress.num_pairs, progress.num_malformed) == (1, 2, 0)


@pytest.mark.parametrize("key", ["passages", "documents", "texts"])
def test_a_beir_passage_is_scored_as_an_evaluation_scores_it(
    scorer: Scorer, tmp_path: Path, key: str
) -> None:
    passage = {"_id": "p1", "title": "Panda", "text": "A bear of China."}
    [row], _, _ = rank_all(scorer, lines({"_id": "q1", "query": "panda", key: [passage]}))
    (tmp_path / "corpus.jsonl").write_text(json.dumps(passage))
    [text] = read_corpus(tmp_path).values()
    assert row["id"] == "q1"
    assert row["results"] == [
        {"index": 0, "id": "p1", "title": "Panda", "score": pytest.approx(scorer.score([("panda", text)])[0])}
    ]
    assert scorer.score([("panda", text)]) != scorer.score([("panda", passage["text"])])


def test_a_request_that_the_scorer_refuses_is_left_out(scorer: Scorer) -> None:
    class Picky:
        def rank_many(self, requests: Any, *cuts: Any) -> Any:
            for index, (query, _) in enumerate(requests):
                if query == "unreadable":
                    raise InputError(f"request {index}: the query is blank", index=index)
            return scorer.rank_many(requests, *cuts)

    picky: Any = Picky()
    bad = {**REQUEST, "query": "unreadable"}
    source = lines(REQUEST, bad, bad, REQUEST, bad)
    rows, malformed, _ = rank_all(picky, source)
    assert [row["line"] for row in rows] == [1, 4]
    assert malformed == [2, 3, 5]
    rows, malformed, _ = rank_all(picky, source, skip=3)
    assert [row["line"] for row in rows] == [4]
    assert malformed == [5]
    batches = rank_lines(
        picky, source, strict=True, on_malformed=lambda _: pytest.fail("strict raises"), progress=Progress()
    )
    assert [json.loads(row)["line"] for row in next(batches)] == [1]
    with pytest.raises(MalformedLineError, match="line 2: the query is blank"):
        next(batches)


def test_the_first_line_is_looked_at_and_not_lost() -> None:
    source = [b"{}\n", b"[]\n"]
    assert list(check_format(iter(source))) == source
    assert list(check_format([])) == []
    assert list(check_format([b"\xef\xbb\xbf{}"])) == [b"\xef\xbb\xbf{}"]
    with pytest.raises(MalformedInputError, match="zip"):
        check_format([b"PK\x03\x04..."])


def test_many_small_requests_give_the_scores_of_each_alone(scorer: Scorer, texts: list[str]) -> None:
    rng = random.Random(5)
    rows = [{"query": rng.choice(texts)[:40], "passages": rng.sample(texts, 7)} for _ in range(200)]
    together, _, progress = rank_all(scorer, lines(*rows))
    assert [row["line"] for row in together] == list(range(1, 201))
    assert progress.num_pairs == 1400
    for index in (0, 80, 199):
        [alone], _, _ = rank_all(scorer, lines(rows[index]))
        scores = [found["score"] for found in together[index]["results"]]
        assert scores == pytest.approx([found["score"] for found in alone["results"]], abs=1e-5)


def test_a_blank_query_is_left_out_and_a_blank_passage_comes_last(scorer: Scorer) -> None:
    rows = [
        {"query": " ", "passages": ["a"]},
        {"query": "panda", "passages": ["", {"id": "b", "text": "A bear."}, {"id": "c", "text": "\n"}]},
        REQUEST,
    ]
    results, malformed, progress = rank_all(scorer, lines(*rows))
    assert malformed == [1]
    assert [found["index"] for found in results[0]["results"]] == [1, 0, 2]
    assert results[0]["results"][1:] == [
        {"index": 0, "score": -65504.0, "blank": True},
        {"index": 2, "id": "c", "score": -65504.0, "blank": True},
    ]
    assert all("blank" not in found for found in results[1]["results"])
    assert (progress.num_rows, progress.num_malformed) == (2, 1)


def test_a_query_that_only_the_tokenizer_finds_blank_is_left_out_too() -> None:
    blank = {"query": "\ufffd", "passages": ["a"]}
    with Scorer("embedded", device="cpu", dtype="float32") as scorer:
        results, malformed, progress = rank_all(scorer, lines(REQUEST, blank, REQUEST, blank))
        assert ([row["line"] for row in results], malformed) == ([1, 3], [2, 4])
        assert (progress.num_rows, progress.num_pairs, progress.num_malformed) == (2, 4, 2)


def test_top_n_and_threshold_cut(scorer: Scorer) -> None:
    [row], _, _ = rank_all(scorer, lines(REQUEST), top_n=1)
    assert len(row["results"]) == 1
    [row], _, _ = rank_all(scorer, lines(REQUEST), threshold=1e6)
    assert row["results"] == []


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'{"passages": []}', "`query` is missing"),
        (b'{"query": 5, "passages": []}', "`query` is not a string"),
        (b'{"query": " \\n", "passages": []}', "`query` is blank"),
        (b'{"query": "q"}', "`passages` is missing"),
        (b'{"query": "q", "passages": null}', "`passages` is not a list"),
        (b'{"query": "q", "passages": ["p"], "texts": []}', "`passages` and `texts` are both given"),
        (b'{"query": "q", "documents": "p"}', "`documents` is not a list"),
        (b'{"query": "q", "texts": [1]}', r"`texts\[0\]` is neither"),
        (b'{"query": "q", "passages": "p"}', "`passages` is not a list"),
        (b'{"query": "q", "passages": ["p", 5]}', r"`passages\[1\]` is neither"),
        (b'{"query": "q", "passages": [{"id": 1}]}', r"`passages\[0\]` has no `text`"),
        (b'{"query": "q", "passages": [{"text": null}]}', r"`text` of `passages\[0\]` is not a string"),
        (b'{"query": "q", "passages": [{"text": "", "title": 1}]}', r"`title` of `passages\[0\]`"),
        (b'{"query": "q", "passages": [], "id": 1.5}', "`id` of the request is neither"),
        (b'{"query": "q", "passages": [{"id": true, "text": "p"}]}', r"`id` of `passages\[0\]` is neither"),
        (b'{"query": "q", "passages": [{"id": 1, "_id": "1", "text": "p"}]}', "which differ"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(raw: bytes, reason: str) -> None:
    with pytest.raises(MalformedLineError, match=f"^line 17: .*{reason}") as caught:
        parse_request(17, raw)
    assert caught.value.line == 17


def test_malformed_lines_are_left_out_and_the_rest_is_ranked(scorer: Scorer) -> None:
    source = [b"{\n", *lines(REQUEST), b"\n", b"nonsense\n", *lines(REQUEST), b"null"]
    rows, malformed, progress = rank_all(scorer, source)
    assert [row["line"] for row in rows] == [2, 5]
    assert malformed == [1, 4, 6]
    assert progress.num_malformed == 3


def test_a_byte_order_mark_and_odd_ids_do_no_harm(scorer: Scorer) -> None:
    row = {**REQUEST, "id": "\ud800"}
    rows, malformed, _ = rank_all(scorer, [b"\xef\xbb\xbf" + lines(row)[0].replace(b"\n", b"\r\n")])
    assert (rows[0]["id"], malformed) == ("\ud800", [])


def test_a_score_that_is_not_finite_is_named_by_line_and_passage() -> None:
    class Broken:
        def rank_many(self, *_: object) -> None:
            raise NonFiniteScoreError("pair 3", index=3)

    broken: Any = Broken()
    with pytest.raises(NonFiniteScoreError, match=r"line 3: .* passage 1 ") as caught:
        rank_all(broken, [*lines(REQUEST), b"\n", *lines(REQUEST)])
    assert caught.value.index == 1


def test_strict_gives_the_rows_before_the_malformed_line_and_raises(scorer: Scorer) -> None:
    batches = rank_lines(
        scorer,
        [*lines(REQUEST), b"{\n", *lines(REQUEST)],
        strict=True,
        on_malformed=lambda _: pytest.fail("strict raises"),
        progress=Progress(),
    )
    assert len(next(batches)) == 1
    with pytest.raises(MalformedLineError, match="line 2"):
        next(batches)


def test_no_more_than_a_bounded_part_of_the_input_is_read_ahead(scorer: Scorer) -> None:
    read = 0

    def endless() -> Iterable[bytes]:
        nonlocal read
        while True:
            read += 1
            yield lines({"query": "panda", "passages": [f"passage {read}"]})[0]

    batches = rank_lines(scorer, endless(), on_malformed=lambda _: None, progress=Progress())
    num_rows = len(next(batches))
    assert read == num_rows <= 1024


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "ranked.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"{}\n")
    return path


def leave_behind(output: Path, settings: dict[str, Any], source: Path, text: str) -> None:
    """Write the files that a killed job leaves behind."""
    with FileJob(output, settings, source) as job:
        job.begin()
    Path(f"{output}.partial").write_text(text)


def test_a_finished_job_has_its_rows_and_nothing_else_under_its_name(output: Path, source: Path) -> None:
    with FileJob(output, {"model": "m"}, source) as job:
        assert job.begin() == 0
        job.write([['{"line": 1}\n'], ['{"line": 2}\n', '{"line": 3}\n']])
    assert output.read_text() == '{"line": 1}\n{"line": 2}\n{"line": 3}\n'
    assert not Path(f"{output}.partial").exists()
    with FileJob(output, {"model": "m"}, source) as job:
        assert job.begin() is None


@pytest.mark.parametrize(
    ("left", "done", "kept"),
    [
        ("", 0, ""),
        ('{"line": 1}\n{"line": 4}\n', 4, '{"line": 1}\n{"line": 4}\n'),
        ('{"line": 1}\n{"line": 4', 1, '{"line": 1}\n'),
        ('{"li', 0, ""),
        ('{"line": 1}\n{"line": 2, "x": "' + "y" * 200_000, 1, '{"line": 1}\n'),
        ('{"line": 7, "x": "' + "y" * 200_000 + '"}\n{"li', 7, '{"line": 7, "x": "' + "y" * 200_000 + '"}\n'),
    ],
)
def test_an_incomplete_row_is_removed(output: Path, source: Path, left: str, done: int, kept: str) -> None:
    leave_behind(output, {}, source, left)
    with FileJob(output, {}, source) as job:
        assert job.begin() == done
    assert Path(f"{output}.partial").read_text() == kept


@pytest.mark.parametrize("extra", ["\n", "{}\n", "not JSON\n"])
def test_a_partial_file_that_does_not_end_with_a_row_is_refused(
    output: Path, source: Path, extra: str
) -> None:
    leave_behind(output, {}, source, '{"line": 1}\n' + extra)
    with FileJob(output, {}, source) as job, pytest.raises(DatasetError, match="does not end with a row"):
        job.begin()


def test_another_job_is_refused(output: Path, source: Path) -> None:
    leave_behind(output, {"model": "one", "top_n": 3}, source, '{"line": 1}\n')
    with (
        FileJob(output, {"model": "two", "top_n": 3}, source) as job,
        pytest.raises(DatasetError, match=r"other settings \(model\)"),
    ):
        job.begin()
    source.write_bytes(b"{}\n{}\n")
    with (
        FileJob(output, {"model": "one", "top_n": 3}, source) as job,
        pytest.raises(DatasetError, match="started with another content of its input file"),
    ):
        job.begin()


def test_overwriting_begins_again_and_keeps_what_is_finished_until_the_end(
    output: Path, source: Path
) -> None:
    output.write_text("old\n")
    with FileJob(output, {}, source, overwrite=True) as job:
        assert job.begin() == 0
    assert output.read_text() == "old\n"
    with FileJob(output, {}, source) as job:
        assert job.begin() == 0, "the old output must not count as this job's output"
        job.write([["new\n"]])
    assert output.read_text() == "new\n"


def write_until_malformed(job: FileJob, *rows: str) -> None:
    def batches() -> Iterator[list[str]]:
        yield from ([row] for row in rows)
        raise MalformedLineError(len(rows) + 1, "it is not JSON")

    with pytest.raises(MalformedLineError):
        job.write(batches())


def test_the_rows_before_a_malformed_line_are_kept(output: Path, source: Path) -> None:
    with FileJob(output, {}, source) as job:
        job.begin()
        write_until_malformed(job, '{"line": 1}\n', '{"line": 2}\n')
    assert Path(f"{output}.partial").read_text() == '{"line": 1}\n{"line": 2}\n'
    with FileJob(output, {}, source) as job:
        assert job.begin() == 2
        job.write([['{"line": 3}\n']])
    assert output.read_text() == '{"line": 1}\n{"line": 2}\n{"line": 3}\n'


def test_a_job_without_rows_leaves_no_files_after_a_malformed_line(output: Path, source: Path) -> None:
    with FileJob(output, {}, source) as job:
        job.begin()
        write_until_malformed(job)
    assert not [path for path in output.parent.iterdir() if path.suffix in {".partial", ".json"}]


def test_an_older_output_never_counts_as_that_of_a_job_without_rows(output: Path, source: Path) -> None:
    output.write_text("old\n")
    with FileJob(output, {}, source, overwrite=True) as job:
        job.begin()
        write_until_malformed(job)
    assert output.read_text() == "old\n"
    with FileJob(output, {}, source) as job:
        assert job.begin() == 0, "the job is not complete"


def test_a_file_of_unknown_origin_is_refused(output: Path, source: Path) -> None:
    output.write_text("precious\n")
    with (
        FileJob(output, {}, source) as job,
        pytest.raises(DatasetError, match="not written by a ranking job"),
    ):
        job.begin()
    assert output.read_text() == "precious\n"


def test_a_job_with_a_stream_as_input_cannot_be_resumed(output: Path) -> None:
    with FileJob(output, {}, None) as job:
        assert job.begin() == 0
        job.write([['{"line": 1}\n']])
    with FileJob(output, {}, None) as job, pytest.raises(DatasetError, match="is a stream"):
        job.begin()


@pytest.mark.parametrize("suffix", ["", ".partial", ".job.json", ".job.json.tmp"])
def test_the_input_is_never_written_over(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("{}\n")
    with pytest.raises(DatasetError, match="is the input"):
        FileJob(tmp_path / "x", {}, path, overwrite=True)
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("damage", "text"), [("partial", "nonsense\n"), ("job.json", "{"), ("job.json", "[]")]
)
def test_damage_is_reported(output: Path, source: Path, damage: str, text: str) -> None:
    leave_behind(output, {}, source, '{"line": 1}\n')
    Path(f"{output}.{damage}").write_text(text)
    with FileJob(output, {}, source) as job, pytest.raises(DatasetError, match=r"does not end|damaged"):
        job.begin()


def test_invalid_inputs_and_outputs_are_reported(output: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        FileJob(output, {}, tmp_path / "missing")
    with pytest.raises(DatasetError, match="not a regular file"):
        FileJob(Path("/dev/null"), {}, None)


def test_two_processes_cannot_write_one_file(output: Path) -> None:
    with FileJob(output, {}, None):
        code = (
            "import sys; from pathlib import Path; from bge_rerank_integrations.cli.jobs.file_job import FileJob\n"
            "with FileJob(Path(sys.argv[1]), {}, None): pass"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=False
        )
    assert "another process is writing" in run.stderr


def command(source: Path, model: Path | str, *options: str) -> list[str]:
    line = [sys.executable, "-m", "bge_rerank_integrations.cli", "rank", str(source), "--model", str(model)]
    return [*line, "--device", "cpu", *options]


@pytest.mark.parametrize(
    ("num_rows", "num_kills", "model"),
    [
        pytest.param(2000, 4, None, id="small"),
        pytest.param(5000, 20, "embedded", id="embedded", marks=pytest.mark.slow),
    ],
)
def test_killing_a_job_loses_and_repeats_nothing(
    checkpoint: Path, tmp_path: Path, texts: list[str], num_rows: int, num_kills: int, model: str | None
) -> None:
    rng = random.Random(3)
    source, output, undisturbed = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    # Passages in every form, and a malformed line after every tenth row.
    forms: list[tuple[str, Callable[[str], Any]]] = [
        ("passages", lambda text: text),
        ("documents", lambda text: {"id": 7, "text": text}),
        ("texts", lambda text: {"_id": "p", "title": "Title", "text": text}),
    ]
    written = []
    for i in range(num_rows):
        key, form = forms[i % 3]
        passages = [form(text[:60]) for text in rng.sample(texts, 3)]
        written += lines({"id": i, "query": rng.choice(texts)[:50], key: passages})
        written += [b"nonsense\n"] * (i % 10 == 0)
    source.write_bytes(b"".join(written))
    job = ("--return-texts", "-o", str(output))
    subprocess.run(
        command(source, model or checkpoint, "--return-texts", "-o", str(undisturbed)),
        check=True,
        capture_output=True,
    )
    partial = Path(f"{output}.partial")
    kills = 0
    while kills < num_kills and not output.exists():
        process = subprocess.Popen(command(source, model or checkpoint, *job), stderr=subprocess.DEVNULL)
        size = partial.stat().st_size if partial.exists() else 0
        # Kill at different times: while the model loads, just after a batch, or in the middle of a batch.
        while (
            kills % 3 and process.poll() is None and not (partial.exists() and partial.stat().st_size > size)
        ):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills, "the job ended before the first kill"
    subprocess.run(command(source, model or checkpoint, *job), check=True, capture_output=True)
    ranked = [json.loads(row) for row in output.read_text().splitlines()]
    assert [row["id"] for row in ranked] == list(range(num_rows))
    assert all("text" in found for row in ranked for found in row["results"])
    assert output.read_text() == undisturbed.read_text()


# Runs the command and raises SIGINT after each batch of rows. It sets the SIGINT handler itself, because the tests
# may have been started with SIGINT ignored.
INTERRUPT = """
import importlib, signal
from bge_rerank_integrations.cli.app import main

signal.signal(signal.SIGINT, {handler})
module = importlib.import_module("bge_rerank_integrations.cli.rank")
rank_lines = module.rank_lines

def interrupted(*args, **options):
    for rows in rank_lines(*args, **options):
        yield rows
        signal.raise_signal(signal.SIGINT)

module.rank_lines = interrupted
main()
"""


def interrupt(command_line: list[str], handler: str) -> subprocess.CompletedProcess[str]:
    code = INTERRUPT.format(handler=handler)
    arguments = command_line[command_line.index("rank") :]
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_an_interrupted_job_says_how_to_resume_it(checkpoint: Path, tmp_path: Path, texts: list[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(lines(*({"query": texts[0], "passages": texts[:8]} for _ in range(150)))))
    stopped = interrupt(command(source, checkpoint, "-o", str(output)), "signal.default_int_handler")
    assert stopped.returncode == 1
    assert "Stopped. Run the same command again to resume." in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not output.exists()
    num_rows = Path(f"{output}.partial").read_bytes().count(b"\n")
    assert num_rows == 512 // 8
    again = subprocess.run(
        command(source, checkpoint, "-o", str(output)), capture_output=True, text=True, check=True
    )
    assert f"Resuming after line {num_rows}." in again.stderr
    assert [json.loads(row)["line"] for row in output.read_text().splitlines()] == list(range(1, 151))


def test_a_job_in_the_background_ignores_interrupts(
    checkpoint: Path, tmp_path: Path, texts: list[str]
) -> None:
    """A shell starts background jobs with SIGINT ignored, so that Ctrl-C only stops the foreground job."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(lines(*({"query": texts[0], "passages": texts[:8]} for _ in range(150)))))
    finished = interrupt(command(source, checkpoint, "-o", str(output)), "signal.SIG_IGN")
    assert finished.returncode == 0
    assert finished.stderr.startswith("150 request(s), 1200 pair(s) ranked.\n")
    assert output.read_bytes().count(b"\n") == 150


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(checkpoint: Path, tmp_path: Path, texts: list[str]) -> None:
    """The peak memory for 100,000 pairs, fifty per row, is at most 300 MB above that for a hundred pairs."""
    rng = random.Random(4)
    english = " ".join(texts)
    peaks = []
    for num_rows in (2, 2000):
        source = tmp_path / f"{num_rows}.jsonl"
        with source.open("wb") as file:
            for _ in range(num_rows):
                starts = [rng.randrange(len(english)) for _ in range(50)]
                passages = [english[start : start + rng.randint(100, 900)] for start in starts]
                file.writelines(lines({"query": rng.choice(texts)[:50], "passages": passages}))
        options = ["-o", str(tmp_path / f"{num_rows}.out"), "--max-length", "128"]
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, *command(source, checkpoint, *options)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(run.stdout) / 1024)  # kilobytes on Linux
    assert peaks[1] - peaks[0] <= 300, peaks
    print(f"peak {peaks[1]:.0f} MiB, {peaks[1] - peaks[0]:.0f} MiB more than for a hundred pairs")
