"""Both apps, through the functions that a user's command line calls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from examples import langchain_rag, llama_index_rag
from examples.answer import find_quote, format_quote, split_sentences
from examples.folder import find_files
from examples.terminal import make_label, pad
from tests.examples.conftest import Runner
from tests.examples.llm_server import serve_llm
from tests.support.scorers import TableScorer

ROOT = Path(__file__).parents[2]
QUESTION = "Which planet is the hottest?"

both_apps = pytest.mark.parametrize("app", [langchain_rag, llama_index_rag], ids=["langchain", "llama_index"])


@both_apps
def test_an_app_answers_with_a_quote_and_names_its_source(
    app: ModuleType, folder: Path, run_main: Runner
) -> None:
    output = run_main(app, QUESTION, "--folder", folder)
    assert "5 files new or changed, 0 gone, 0 skipped" in output
    assert f"Question: {QUESTION}" in output
    assert "Answer: “Venus is the hottest planet.” [1]" in output
    assert re.search(r"\n +1  planets\.html > Planets > Venus +0\.\d{4}   was #1\n", output)
    assert re.search(r"Milliseconds: index \d+, load \d+, retrieve \d+, rerank \d+, answer \d+\n$", output)
    assert "without the reranker" not in output

    again = run_main(app, QUESTION, "--folder", folder)
    assert "0 files new or changed" in again
    assert "Answer: “Venus is the hottest planet.” [1]" in again


@both_apps
def test_compare_prints_both_rankings_and_both_answers(
    app: ModuleType, folder: Path, run_main: Runner
) -> None:
    # The words of the question are all here, and the answer is not.
    (folder / "decoy.md").write_text("Which planet is the hottest is a question that I ask: which planet?\n")
    output = run_main(app, QUESTION, "--folder", folder, "--compare", "--top-n", "1")
    before, after = output.split("\nAnswer: ")
    assert "Answer without the reranker: “Which planet" in before
    assert "  1  decoy.md" in before
    assert "Venus is the hottest planet." in after
    assert re.search(r"\n +1  planets\.html > Planets > Venus +0\.\d{4}   was #[234]\n", after)
    assert "decoy.md" not in after


@both_apps
def test_every_kind_of_file_answers(app: ModuleType, folder: Path, run_main: Runner) -> None:
    for question, quote, source in [
        ("How do I get rid of the program?", "delete its folder.", "guide.md > Guide > Removal"),
        ("What did the audit find?", "The audit found a missing invoice.", "report.pdf, page 2"),
        ("Where did coffee come from?", "Coffee came from Yemen.", "facts.jsonl > Coffee"),
        ("大熊猫吃什么", "大熊猫主要吃竹子。", "sub/panda.txt"),
    ]:
        output = run_main(app, question, "--folder", folder)
        assert re.search(rf"Answer: “[^”]*{re.escape(quote)}” \[1\]", output)
        assert re.search(rf"\n +1  {re.escape(source)} ", output)


@both_apps
def test_splitting_keeps_code_and_headings(app: ModuleType, folder: Path) -> None:
    [file] = find_files([folder / "guide.md"])
    chunks = list(app.split_file(file))
    text = "\n".join(chunk.text for chunk in chunks)
    assert "  make install" in text
    assert "# not a heading" in text
    assert [chunk.heading for chunk in chunks] == ["Guide", "Guide > Installation", "Guide > Removal"]
    assert "##" not in text


@both_apps
def test_long_text_is_split_at_sentences_in_both_scripts(app: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("This sentence has a number of words in it. " * 200)
    (tmp_path / "zh.txt").write_text("这是一个关于大熊猫的句子，它不太长。" * 200)
    english, chinese = (list(app.split_file(file)) for file in find_files([tmp_path]))
    assert 8 <= len(english) <= 40
    assert all(chunk.text.strip().endswith("words in it.") for chunk in english)
    assert 4 <= len(chinese) <= 40
    assert all(chunk.text.strip().endswith("。") for chunk in chinese)


@both_apps
def test_half_of_a_surrogate_pair_is_no_obstacle(app: ModuleType, folder: Path, run_main: Runner) -> None:
    (folder / "facts.jsonl").write_text('{"text": "Zebras \\ud800 have stripes."}\n')
    assert "Answer: “Zebras \N{REPLACEMENT CHARACTER} have stripes.” [1]" in run_main(
        app, "zebra\ud800 stripes", "--folder", folder
    )


@both_apps
def test_a_section_longer_than_a_chunk_keeps_its_heading(app: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# Top\n\n## Long\n\n" + "A sentence of some words. " * 200 + "\n## Next\n\nEnd."
    )
    chunks = [chunk for file in find_files([tmp_path]) for chunk in app.split_file(file)]
    assert len(chunks) > 4
    assert {chunk.heading for chunk in chunks[:-1]} == {"Top > Long"}
    assert (chunks[-1].heading, chunks[-1].text.strip()) == ("Top > Next", "End.")


@both_apps
def test_bad_files_are_named_and_the_others_searched(
    app: ModuleType, folder: Path, run_main: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.MonkeyPatch.context() as patch:
        errors: list[str] = []
        patch.setattr(sys.stderr, "write", errors.append)
        output = run_main(app, QUESTION, "--folder", folder)
    assert "2 skipped" in output
    assert "Venus" in output
    assert "skipped binary.txt: it is binary" in "".join(errors)
    assert "skipped broken.pdf: it is no PDF that can be read" in "".join(errors)


@both_apps
def test_an_error_is_one_line(app: ModuleType, folder: Path, tmp_path: Path, run_main: Runner) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match=r"^error: '.*none' does not exist$"):
        run_main(app, "--folder", tmp_path / "none")
    with pytest.raises(SystemExit, match=r"^error: there is no document in .*empty: looked for \.md,"):
        run_main(app, "--folder", empty)
    (empty / "empty.md").touch()
    with pytest.raises(SystemExit, match=r"^error: none of the 1 files could be read$"):
        run_main(app, "--folder", empty)
    with pytest.raises(SystemExit, match=r"^error: model folder '/no/such/folder' does not exist$"):
        run_main(app, "--folder", folder, "--model", "/no/such/folder")
    with pytest.raises(SystemExit, match=r"^error: the embedding model '/no/such/model' cannot be loaded"):
        run_main(app, "--folder", folder, "--embedding", "/no/such/model")


@both_apps
def test_a_question_that_nothing_fits_gets_no_answer(app: ModuleType, folder: Path, run_main: Runner) -> None:
    output = run_main(app, "xyzzy?", "--folder", folder, "--compare")
    assert "\nAnswer: Nothing found.\n" in output
    assert "Best 0 of 0" in output


@both_apps
def test_a_local_language_model_answers_from_the_passages(
    app: ModuleType, folder: Path, run_main: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve_llm("It is Venus [1].") as server:
        llm = ["--llm", "openai:my-model", "--llm-url", server.url]
        output = run_main(app, QUESTION, "--folder", folder, *llm)
        assert "\nAnswer: It is Venus [1].\n" in output
        [request] = server.requests
        assert (request["path"], request["model"]) == ("/v1/chat/completions", "my-model")
        asked = "".join(str(message["content"]) for message in request["messages"])
        assert "Venus is the **hottest** planet." in asked
        assert "planets.html > Planets > Venus" in asked
        assert "retrieval_rank" not in asked
        assert QUESTION in asked

        server.status = 400
        with pytest.raises(SystemExit, match=r"^error: the language model failed: "):
            run_main(app, QUESTION, "--folder", folder, *llm)


@both_apps
def test_an_unknown_language_model_is_one_line(app: ModuleType, folder: Path, run_main: Runner) -> None:
    with pytest.raises(SystemExit, match=r"^error: "):
        run_main(app, "--folder", folder, "--llm", "nobody:nothing")


@both_apps
def test_vectors_of_a_sentence_transformer_are_kept_and_used(
    app: ModuleType, folder: Path, run_main: Runner, embedding_model: Path
) -> None:
    output = run_main(app, QUESTION, "--folder", folder, "--embedding", embedding_model)
    # Words find one chunk or two; vectors give every chunk a rank.
    assert int(output.split("Best ")[1].split(" of ")[1].split(",")[0]) == 9
    assert "Answer: “Venus is the hottest planet.” [1]" in output
    again = run_main(app, QUESTION, "--folder", folder, "--embedding", embedding_model)
    assert "0 files new or changed" in again


@both_apps
def test_without_a_folder_the_documentation_is_searched(app: ModuleType, run_main: Runner) -> None:
    output = run_main(app, "Giant panda bamboo diet", "--top-n", "2")
    assert "0 gone, 0 skipped" in output
    assert "  1  examples/corpus.jsonl > Giant panda" in output


def test_a_fresh_clone_answers_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.langchain_rag", "--index", str(tmp_path), "--top-n", "2"]
    result = subprocess.run(
        [*command, "Giant panda bamboo diet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "  1  examples/corpus.jsonl > Giant panda" in result.stdout


def test_a_quote_is_a_sentence_without_its_markup() -> None:
    text = "# Title\n\nA **bold** `word`. [Next](a.md)!\nstill next\n\n- one\n- two\n\n1. three 中文。更多？\n---\n| a | b |\n| --- | --- |\n| 1 | 2 |\n```sh\nls\n```\n"
    assert split_sentences(text) == [
        "Title",
        "A bold word.",
        "Next!",
        "still next",
        "one",
        "two",
        "three 中文。",
        "更多？",
        "a | b",
        "1 | 2",
        "ls",
    ]
    scorer = TableScorer({"Tea: It is hot.": 0.9, "Bears: They are big.": 0.2})
    quote = find_quote(
        scorer, "What is tea like?", [("Bears", "They are big."), ("Tea", "It is. It is hot.")]
    )
    assert format_quote(quote) == "“It is hot.” [2]"
    assert find_quote(scorer, "What?", []) is None
    assert find_quote(scorer, "What?", [("Bears", "---")]) is None
    assert format_quote(None) == "Nothing found."


def test_labels_and_columns() -> None:
    assert make_label("a.pdf", 3, "") == "a.pdf, page 3"
    assert make_label("a.md", None, "Top > Sub") == "a.md > Top > Sub"
    assert pad("大熊猫", 5) == "大熊 "
