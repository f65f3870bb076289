"""Measuring on one's own questions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import DatasetError
from examples import evaluate_my_rag, langchain_rag
from examples.evaluate_my_rag import QUESTIONS, Answer, check_answers, evaluate, read_questions
from examples.folder import DEFAULT_PATHS, find_files
from examples.store import ChunkStore, FoundChunk
from tests.examples.conftest import Runner

DECOY = "Which planet is the hottest? Which planet is the hottest? A quiz for children.\n"


def write_questions(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["question", "file", "passage"], *rows])
    return path


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_before_and_after_are_measured_and_drawn(
    folder: Path, tmp_path: Path, run_main: Runner, framework: str
) -> None:
    (folder / "decoy.txt").write_text(DECOY)
    questions = write_questions(
        tmp_path / "questions.csv",
        [
            ["Which planet is the hottest?", "planets.html", "VENUS  is the"],
            ["What did the audit find?", "report.pdf", ""],
            ["xyzzy", "guide.md", ""],
        ],
    )
    plot = tmp_path / "gain.png"
    output = run_main(
        evaluate_my_rag,
        *["--folder", folder, "--questions", questions, "--plot", plot, "--framework", framework],
    )
    assert "3 questions" in output
    assert "1 of them have no answer among the chunks that were found" in output
    # The decoy is before the answer until it is reranked; one question of three has no answer.
    rows = {line[:12].strip(): line[12:].split() for line in output.splitlines()}
    assert rows["MRR@10"][:3] == ["0.500", "0.667", "+0.167"]
    assert rows["nDCG@10"][:2] == ["0.544", "0.667"]
    assert rows["hit rate@1"][:2] == ["0.333", "0.667"]
    assert "Helped most, in nDCG@10:\n  0.631 to 1.000  Which planet is the hottest?" in output
    assert "Hurt most" not in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_answer_counts_once_and_at_its_best_chunk(tmp_path: Path, scorer: Scorer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "zebra zebra one"}\n{"text": "zebra two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "zebra zebra zebra"}\n')
    store = ChunkStore(tmp_path / "index")
    store.update(find_files([tmp_path]), langchain_rag.split_file)
    assert [chunk.file for chunk in store.search("zebra", 9)] == ["b.jsonl", "a.jsonl", "a.jsonl"]
    report = evaluate(scorer, store, {"zebra": [Answer("a.jsonl", "", 2)]})
    # Both chunks of the file answer, and the ideal is still one of them in the first place.
    assert report.before["MRR@10"] == 0.5
    assert report.before["nDCG@10"] == pytest.approx(0.6309, abs=1e-4)
    assert report.curve[0] == report.before["nDCG@10"]
    both = evaluate(scorer, store, {"zebra": [Answer("a.jsonl", "ONE", 2), Answer("b.jsonl", "", 3)]})
    assert both.before["nDCG@10"] == 1
    assert (both.num_pairs, both.num_unanswered) == (3, 0)
    assert both.num_tokens > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a header with file, question"),
        ("question,passage\na,b\n", "needs a header with file"),
        ("question,file\n", "has no questions"),
        ("question,file\nWhy?,a.md\n ,a.md\n", "line 3: question and file must not be empty"),
        ("question,file\nWhy?\n", "line 2: question and file must not be empty"),
    ],
)
def test_a_malformed_file_of_questions_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "questions.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_questions(path)


def test_a_file_of_questions_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        read_questions(tmp_path / "none.csv")
    (tmp_path / "legacy.csv").write_bytes("question,file\nGröße?,a.md\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="is not CSV in UTF-8"):
        read_questions(tmp_path / "legacy.csv")


def test_questions_that_nothing_could_answer_are_refused(tmp_path: Path) -> None:
    path = write_questions(
        tmp_path / "questions.csv",
        [["Why?", "a.md", "Because of   this"], ["Why?", "b.md", ""], ["How?", "a.md", "SECRET"]],
    )
    questions = read_questions(path)
    assert [(answer.file, answer.line) for answer in questions["Why?"]] == [("a.md", 2), ("b.md", 3)]
    chunks = [FoundChunk("1", "a.md", None, "", "because\nof this secret", 0.0)]
    with pytest.raises(DatasetError, match=r"line 3: 'b\.md' is not in the index"):
        check_answers(path, questions, chunks)
    chunks.append(FoundChunk("2", "b.md", None, "", "other", 0.0))
    check_answers(path, questions, chunks)
    chunks[0] = FoundChunk("1", "a.md", None, "", "because of this", 0.0)
    with pytest.raises(DatasetError, match=r"line 4: no chunk of 'a\.md' holds the passage") as error:
        check_answers(path, questions, chunks)
    assert "SECRET" not in str(error.value)


def test_the_shipped_questions_can_be_answered_from_the_default_folder(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "index")
    store.update(find_files(DEFAULT_PATHS), langchain_rag.split_file)
    questions = read_questions(QUESTIONS)
    assert len(questions) >= 30
    check_answers(QUESTIONS, questions, store.chunks())
