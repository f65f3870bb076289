"""The command line with every encoding, closed streams and 80 columns, and its derived options."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.cli import options
from bge_rerank_integrations.cli.app import main
from bge_rerank_integrations.cli.console import WIDTH, cut, wrap
from bge_rerank_integrations.config import Setting, path_to_str

COMMAND = [sys.executable, "-m", "bge_rerank_integrations.cli"]
REQUEST = {"query": "what is a panda?", "passages": ["A bear.", "A car."]}
QUERY = "大熊猫吃什么 what do pandas eat"
# Half of a surrogate pair, which JSON allows but no encoding can represent, and a terminal escape sequence.
ODD = "bears \ud800 eat \x1b[31m fish"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a BEIR folder with Chinese ids and queries."""
    texts = {"文a": "pandas eat bamboo", "b": "cars need fuel that pandas eat", "c": "bears eat fish"}
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in texts.items())
    )
    (tmp_path / "queries.jsonl").write_text(
        "".join(
            json.dumps({"_id": name, "text": text}) + "\n" for name, text in {"问": QUERY, "q": ODD}.items()
        )
    )
    (tmp_path / "qrels" / "test.tsv").write_text(
        "问\t文a\t1\n问\tb\t1\n问\tc\t2\nq\tb\t1\n", encoding="utf-8"
    )
    (tmp_path / "run.trec").write_text(
        "问 Q0 文a 1 3.0 x\n问 Q0 b 2 2.0 x\n问 Q0 c 3 1.0 x\nq Q0 b 1 2.0 x\nq Q0 c 2 1.0 x\n",
        encoding="utf-8",
    )
    return tmp_path


def start(arguments: list[str], encoding: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, env=environment, check=False)


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii"])
def test_no_output_raises_in_any_encoding(checkpoint: Path, folder: Path, encoding: str) -> None:
    on = ["--model", str(checkpoint), "--device", "cpu"]
    shown = start(["rank", "-h"], encoding)
    assert (shown.returncode, shown.stderr) == (0, b"")
    plot = folder / "plot.svg"
    asked = ["eval", str(folder), "--run", str(folder / "run.trec"), "--plot", str(plot), *on]
    evaluated = start(asked, encoding)
    assert evaluated.returncode == 0, evaluated.stderr
    assert b"what do pandas eat" in evaluated.stdout
    assert b"\x1b" not in evaluated.stdout
    assert "<svg" in plot.read_text(encoding="utf-8")
    missing = start(["info", "--model", "/模型"], encoding)
    assert missing.returncode == 1
    assert b"not usable" in missing.stdout
    for result in (shown, evaluated, missing):
        assert b"Traceback" not in result.stderr


def test_a_run_on_stdout_is_utf8_in_any_encoding(checkpoint: Path, folder: Path) -> None:
    arguments = ["rerank-run", str(folder / "run.trec"), str(folder), "--model", str(checkpoint)]
    output = folder / "out.trec"
    assert start([*arguments, "-o", str(output)], "utf-8").returncode == 0
    assert start(arguments, "cp1252").stdout == output.read_bytes()
    assert "文a" in output.read_text(encoding="utf-8")


def in_shell(arguments: list[str], redirection: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = f"{shlex.join([*COMMAND, *arguments])} {redirection}"
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=False, **options)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_streams_are_reported_before_any_work(tmp_path: Path) -> None:
    # If a command did any work first, it would report the missing model instead.
    no_model = ["--model", "/no/such/model"]
    closed_input = in_shell(["rank", *no_model], "<&-")
    assert closed_input.returncode == 2
    assert "standard input is closed" in closed_input.stderr
    for arguments in (["rank"], ["info"], ["check", "--as", "embedded"], ["eval", str(tmp_path)], ["demo"]):
        closed_output = in_shell([*arguments, *no_model], ">&-", input=json.dumps(REQUEST))
        assert closed_output.returncode == 1, arguments
        assert "standard output is closed" in closed_output.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_streams_that_are_not_needed_do_no_harm(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(REQUEST) + "\nnonsense\n")
    arguments = ["rank", str(source), "--model", str(checkpoint)]
    assert in_shell([*arguments, "-o", str(output)], "<&- >&- 2>&-").returncode == 0
    [row] = map(json.loads, output.read_text().splitlines())
    assert len(row["results"]) == 2
    # The message about the malformed line is discarded. It does not end up in the results.
    assert in_shell(arguments, "2>&-").stdout == output.read_text()


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_reader_that_leaves_early_ends_the_command_quietly(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text((json.dumps(REQUEST) + "\n") * 5000)
    result = in_shell(["rank", str(source), "--model", str(checkpoint)], "| head -n 1", cwd=Path.cwd())
    assert json.loads(result.stdout)["line"] == 1
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_plot_is_written_even_if_the_numbers_cannot_be_printed(checkpoint: Path, folder: Path) -> None:
    plot = folder / "plot.svg"
    arguments = ["eval", str(folder), "--model", str(checkpoint), "--plot", str(plot)]
    result = in_shell(arguments, ">/dev/full")
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert "<svg" in plot.read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["info", "--model", "embedded"], ["--version"], ["--help"]])
def test_output_that_cannot_be_written_is_one_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for unbuffered in (False, True):
        if unbuffered:
            monkeypatch.setenv("PYTHONUNBUFFERED", "1")
        else:
            monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        result = in_shell(arguments, ">/dev/full")
        assert result.returncode == 1
        assert result.stderr == "Error: output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_an_output_file_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "requests.jsonl", tmp_path / "ranked.jsonl"
    source.write_text((json.dumps(REQUEST) + "\n") * 200)
    command = [*COMMAND, "rank", str(source), "-o", str(output), "--model", str(checkpoint)]
    limited = f"ulimit -f 16; exec {shlex.join(command)}"  # 16 blocks of 512 or 1,024 bytes
    result = subprocess.run(limited, shell=True, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert " ".join(result.stderr.split()) == f"Error: {output}.partial cannot be written: File too large"
    result = in_shell(command[len(COMMAND) :], "")
    assert result.returncode == 0
    assert "Resuming after line" in result.stderr
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [*range(1, 201)]


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_bar_is_shown_on_a_terminal_only_and_not_with_quiet(checkpoint: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    arguments = ["rank", "--model", str(checkpoint), "--device", "cpu"]
    request = json.dumps(REQUEST)

    def on_terminal(*options: str) -> str:
        reader, terminal = pty.openpty()
        try:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, WIDTH, 0, 0))
            subprocess.run(
                [*COMMAND, *arguments, *options],
                input=request.encode(),
                stdout=subprocess.DEVNULL,
                stderr=terminal,
                check=True,
            )
            os.write(terminal, b"end")
            shown = b""
            while not shown.endswith(b"end"):
                shown += os.read(reader, 4096)
        finally:
            os.close(terminal)
            os.close(reader)
        return shown.decode()

    assert "2pair [" in on_terminal()
    assert "pair [" not in on_terminal("--quiet")
    assert "pair [" not in CliRunner().invoke(main, arguments, input=request).stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_requests_can_be_typed_on_a_terminal(checkpoint: Path) -> None:
    import pty

    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, json.dumps(REQUEST).encode() + b"\n\x04")  # Ctrl-D ends the input
        command = [*COMMAND, "rank", "--model", str(checkpoint), "--device", "cpu"]
        result = subprocess.run(command, stdin=terminal, capture_output=True, text=True, check=True)
    finally:
        os.close(terminal)
        os.close(keyboard)
    assert result.stderr.startswith("Reading requests from the terminal. Press Ctrl-D to end the input.\n")
    assert len(json.loads(result.stdout)["results"]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_messages_that_cannot_be_written_do_not_stop_a_job(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "requests.jsonl", tmp_path / "ranked.jsonl"
    source.write_text("nonsense\n" + json.dumps(REQUEST) + "\n")
    result = in_shell(["rank", str(source), "-o", str(output), "--model", str(checkpoint)], "2>/dev/full")
    assert result.returncode == 0
    assert json.loads(output.read_text())["line"] == 2


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


@pytest.mark.parametrize("command", ["demo", "rank", "rerank-run", "eval", "info", "check", None])
def test_help_fits_80_columns(command: str | None) -> None:
    shown = CliRunner().invoke(main, ["-h"] if command is None else [command, "-h"])
    assert shown.exit_code == 0
    assert [line for line in shown.output.splitlines() if columns(line) > WIDTH] == []


def test_output_fits_80_columns(checkpoint: Path, folder: Path) -> None:
    path = folder / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "text": row["text"] * 20}) + "\n" for row in rows))
    on = ["--model", str(checkpoint), "--device", "cpu"]
    asked: list[list[str]] = [
        ["eval", str(folder), "--run", str(folder / "run.trec"), "--compare", str(folder / "run.trec"), *on],
        ["info", "--device", "cpu"],
        ["check", "--as", "BAAI/bge-reranker-large", *on],
        ["demo", "--depth", "5", *on, "split a string " + QUERY * 9, "abstract base classes of a mapping"],
        ["rank", "--model", "embedded", "--max-length", "16"],
    ]
    for arguments in asked:
        result = CliRunner().invoke(main, arguments, input="{}\n")
        # A path is not broken, so its line can be longer.
        too_long = [line for line in result.output.splitlines() if columns(line) > WIDTH and "/" not in line]
        assert too_long == [], arguments
        assert result.output.count("\n") > 1


def test_texts_are_cut_by_columns() -> None:
    assert cut("a  short\nline", 12) == "a short line"
    assert cut("x" * 13, 12) == "x" * 9 + "..."
    assert cut("熊猫吃竹子熊猫", 12) == "熊猫吃竹..."
    assert cut("\ud800\x1b[0m", 12) == "??[0m"


def test_messages_are_wrapped_and_commands_stay_whole() -> None:
    command = "`hf download BAAI/bge-reranker-base --local-dir bge-reranker-base`"
    lines = wrap(f"To work offline, fetch the model once with {command} and copy it here.").splitlines()
    assert len(lines) > 1
    assert any(command in line for line in lines)
    assert all(len(line) <= WIDTH for line in lines)


@dataclass(frozen=True, kw_only=True)
class GrownConfig(ScorerConfig):
    """A config with more settings.

    Attributes:
        colour: What it is painted with. This second sentence is not part of the help.
        share: Part of `max_length` that is used; None means all of it.
        names: Several names.
        place: One name, which can be given as a path.
        careful: Whether to be careful; needs `long_passages="windows"`.
        max_wait_ms: Not an option of the command line.
    """

    colour: Literal["red", "blue"] = "red"
    share: float | None = None
    names: tuple[str, ...] | None = None
    place: Setting[str | os.PathLike[str] | None, str | None] = Setting(None, path_to_str)  # noqa: RUF009  # a descriptor, as in ScorerConfig
    careful: bool = True


def test_a_new_setting_becomes_an_option_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "ScorerConfig", GrownConfig)
    got: list[Any] = []

    @click.command()
    @options.config_options()
    def show(config: GrownConfig) -> None:
        got.append(config)

    shown = " ".join(CliRunner().invoke(show, ["--help"]).output.split())
    assert "--colour [red|blue] What it is painted with. [default: red]" in shown
    assert "--share FLOAT Part of --max-length that is used. [default: all of it]" in shown
    assert "--names NAME,NAME,... Several names." in shown
    assert "--place TEXT One name" in shown
    assert "needs --long-passages windows" in shown
    assert "--max-wait-ms" not in shown
    arguments = [
        "--colour",
        "blue",
        "--share",
        "0.5",
        "--names",
        "a, b",
        "--place",
        "c, d",
        "--no-careful",
        "--max-length",
        "99",
    ]
    assert CliRunner().invoke(show, arguments).exit_code == 0
    assert CliRunner().invoke(show, []).exit_code == 0
    given, default = got
    assert (given.colour, given.share, given.names, given.careful) == ("blue", 0.5, ("a", "b"), False)
    assert (given.place, given.max_length) == ("c, d", 99)
    assert default == GrownConfig()
    assert CliRunner().invoke(show, ["--colour", "green"]).exit_code == 2


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("max_length must be 1", "--max-length must be 1"),
        ("with local_files_only=True; or", "with --local-files-only; or"),
        ("or use model=\"embedded\", device='cpu'", "or use --model embedded, --device cpu"),
        ("the model on the device", "the model on the device"),
        ("max_wait_ms and max_queued_tokens", "--max-wait-ms and --max-queued-tokens"),
        ("grace_s must be positive", "--grace-s must be positive"),
        ("top_n and api_key", "--top-n and api_key"),
        ("more than max_length=512 tokens", "more than --max-length 512 tokens"),
        ("normalize=True, or with normalize=False", "--normalize, or without --normalize"),
        ("with careful=False", "with careful=False"),
        ("folder /data/max_length/x", "folder /data/max_length/x"),
        ("folder max_length/x.max_length", "folder max_length/x.max_length"),
        ("query 'top_n', passage \"max_length\"", "query 'top_n', passage \"max_length\""),
    ],
)
def test_error_messages_name_options_instead_of_settings(message: str, shown: str) -> None:
    assert options.name_options(message) == shown


ONLY_SERVE = {"max_wait_ms", "max_queued_tokens"}


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("demo", {"normalize", *ONLY_SERVE}),
        ("rank", ONLY_SERVE),
        ("rerank-run", {"normalize", *ONLY_SERVE}),
        ("eval", {"normalize", *ONLY_SERVE}),
        ("serve", {"normalize"}),
        ("info", {"normalize", *ONLY_SERVE}),
        ("check", {"normalize", *ONLY_SERVE}),
    ],
)
def test_every_setting_is_an_option_with_a_help_text(command: str, absent: set[str]) -> None:
    declared = {parameter.name: parameter for parameter in main.commands[command].params}
    settings = {field.name for field in fields(ScorerConfig)}
    assert settings - set(declared) == absent
    for name in settings & set(declared) - {"normalize"}:
        parameter = declared[name]
        assert isinstance(parameter, click.Option)
        assert parameter.help, name
        assert "None" not in parameter.help, name


@pytest.mark.parametrize("name", ["huggingface_hub.file_download", "another_library"])
def test_a_warning_of_a_library_is_printed_once(name: str) -> None:
    code = (
        "import logging, huggingface_hub.file_download\n"
        "from bge_rerank_integrations.cli.logs import warnings_on_stderr\n"
        "with warnings_on_stderr():\n"
        f"    logging.getLogger({name!r}).warning('a warning')\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stderr == "a warning\n"
