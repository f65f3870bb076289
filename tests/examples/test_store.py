"""The index: what is found, what is read again, and what survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from examples import store as store_module
from examples.folder import FolderError, SkippedFileError, SourceFile, find_files, read_pages
from examples.store import Chunk, ChunkStore, Update, split_words

ROOT = Path(__file__).parents[2]


class Splitter:
    """Makes a chunk of each page, and remembers which files it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, file: SourceFile) -> Iterator[Chunk]:
        self.asked.append(file.name)
        for page in read_pages(file.path):
            yield Chunk(page.text, page.heading, page.number)


def index(store: ChunkStore, *paths: Path) -> tuple[Update, list[str]]:
    split = Splitter()
    return store.update(find_files(list(paths)), split), split.asked


def found_files(store: ChunkStore, question: str) -> list[str]:
    return [chunk.file for chunk in store.search(question, 10)]


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore(tmp_path / "index")


def test_a_chunk_is_returned_with_all_its_fields(store: ChunkStore, folder: Path) -> None:
    index(store, folder)
    [chunk] = store.search("invoices missing?", 10)
    assert (chunk.file, chunk.page, chunk.heading) == ("report.pdf", 2, "")
    assert chunk.text.strip() == "The audit found a missing invoice."
    assert chunk.score > 0
    [coffee] = store.search("coffee", 10)
    assert (coffee.file, coffee.page, coffee.heading) == ("facts.jsonl", None, "Coffee")
    assert {chunk.file for chunk in store.chunks()} == {file.name for file in find_files([folder])}
    assert len(store) == len(store.chunks()) == 6


def test_chinese_is_found_by_parts_of_its_words(store: ChunkStore, folder: Path) -> None:
    index(store, folder)
    for question in ("熊猫", "大熊猫吃什么？", "四川 panda"):
        assert found_files(store, question) == ["sub/panda.txt"]


@pytest.mark.parametrize(
    "question",
    [
        '"hottest planet',
        "hottest:planet",
        "title:hottest AND (planet",
        "hottest* OR NOT +planet~2 -mars^3",
        "'; DROP TABLE chunks; -- hottest",
        "hottest\0planet\ud800",
        "hottest " * 3000,
    ],
)
def test_a_question_is_never_a_query_language(store: ChunkStore, folder: Path, question: str) -> None:
    index(store, folder)
    assert found_files(store, question)[0] == "planets.html"


@pytest.mark.parametrize("question", ["", "  ", "?!*", '""', "xyzzy", "🐼"])
def test_a_question_without_known_words_finds_nothing(store: ChunkStore, folder: Path, question: str) -> None:
    assert store.search(question, 10) == []
    index(store, folder)
    assert store.search(question, 10) == []


def test_words_are_split_for_every_script() -> None:
    assert split_words("os.path_join: 大熊猫!") == "os path join 大熊 熊猫"
    assert split_words("C++ naïve 3.14 カタカナ 茶") == "C naïve 3 14 カタ タカ カナ 茶"


def test_only_changed_files_are_read_again(store: ChunkStore, folder: Path) -> None:
    update, asked = index(store, folder)
    assert (update.num_indexed, len(asked)) == (5, 5)
    assert index(store, folder) == (Update(), [])

    (folder / "guide.md").write_text("# Guide\n\nNow about zebras.\n")
    (folder / "new.md").write_text("A giraffe.\n")
    (folder / "facts.jsonl").unlink()
    update, asked = index(store, folder)
    assert asked == ["guide.md", "new.md"]
    assert update == Update(num_indexed=2, num_removed=1)
    assert found_files(store, "zebra") == ["guide.md"]
    assert found_files(store, "giraffes") == ["new.md"]
    assert found_files(store, "installer") == found_files(store, "coffee") == []

    reopened = ChunkStore(store.folder)
    assert index(reopened, folder) == (Update(), [])
    assert found_files(reopened, "zebra") == ["guide.md"]


def test_a_file_that_shrinks_leaves_no_chunk_behind(store: ChunkStore, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text('{"text": "one apple"}\n{"text": "two apples"}\n{"text": "three apples"}\n')
    index(store, file)
    file.write_text('{"text": "an apple"}\n')
    index(store, file)
    assert [chunk.text for chunk in store.search("apples", 10)] == ["an apple"]


def test_files_that_cannot_be_read_are_named_and_leave_the_index(store: ChunkStore, folder: Path) -> None:
    index(store, folder)
    (folder / "guide.md").write_bytes(b"\0\1\2")
    (folder / "bad.pdf").write_bytes(b"%PDF-")
    update, _ = index(store, folder)
    assert [name for name, _ in update.skipped] == ["bad.pdf", "guide.md"]
    assert update.skipped[1] == ("guide.md", "it is binary")
    assert found_files(store, "installer") == []
    assert found_files(store, "hottest") == ["planets.html"]


def test_a_file_that_vanishes_while_it_is_read_is_skipped(store: ChunkStore, folder: Path) -> None:
    files = find_files([folder])
    (folder / "guide.md").unlink()
    update = store.update(files, Splitter())
    assert update.skipped == [("guide.md", "it has vanished")]
    assert update.num_indexed == 4


def test_names_and_texts_may_hold_anything(store: ChunkStore, tmp_path: Path) -> None:
    file = tmp_path / 'it\'s 100% "odd".jsonl'
    file.write_text('{"text": "half \\ud800 of a pair of zebras", "title": "%s"}\n' % ("long " * 500))
    index(store, file)
    [chunk] = store.search("zebra", 10)
    assert chunk.text == "half \N{REPLACEMENT CHARACTER} of a pair of zebras"
    assert len(chunk.heading) == 300
    file.write_text('{"text": "a giraffe"}\n')
    update, _ = index(store, file)
    assert (update.num_indexed, len(store)) == (1, 1)


CRASHING_UPDATE = """
import os, signal, sys
from pathlib import Path
from examples import store as store_module
from examples.folder import find_files
from examples.store import ChunkStore
from tests.examples.test_store import Splitter

store_module._NUM_CHUNKS_A_COMMIT = 1
split = Splitter()

def split_or_die(file):
    if len(split.asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return list(split(file))

ChunkStore(Path(sys.argv[1])).update(find_files([Path(sys.argv[2])]), split_or_die)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_in_the_middle_leaves_an_index_that_works_and_heals(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "index"
    crash = subprocess.run(
        [sys.executable, "-c", CRASHING_UPDATE, place, folder], cwd=ROOT, capture_output=True, check=False
    )
    assert crash.returncode == -signal.SIGKILL, crash.stderr
    store = ChunkStore(place)
    assert {chunk.file for chunk in store.chunks()} == {"facts.jsonl", "guide.md", "planets.html"}
    assert found_files(store, "hottest") == ["planets.html"]
    _, asked = index(store, folder)
    assert asked == ["report.pdf", "sub/panda.txt"]

    whole = ChunkStore(tmp_path / "whole")
    index(whole, folder)
    assert {chunk.id: chunk for chunk in store.chunks()} == {chunk.id: chunk for chunk in whole.chunks()}
    assert len(store.chunks()) == len(whole.chunks())


def test_chunks_left_out_of_the_full_text_index_get_into_it(
    store: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(**options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._table, "optimize", die)
        with pytest.raises(KeyboardInterrupt):
            index(store, folder)
    assert store._num_unindexed() == 6
    assert found_files(store, "hottest") == ["planets.html"]
    assert index(store, folder) == (Update(), [])
    assert store._num_unindexed() == 0


def test_an_update_that_raises_keeps_the_old_index(
    store: ChunkStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(store, folder)
    os.utime(folder / "guide.md", ns=(1, 1))

    def fail(file: SourceFile) -> list[Chunk]:
        raise RuntimeError("a bug in a splitter")

    with pytest.raises(RuntimeError, match="a bug"):
        store.update(find_files([folder]), fail)
    assert found_files(store, "installer") == ["guide.md"]
    assert index(store, folder)[1] == ["guide.md"]


def test_a_second_process_sees_what_the_first_one_wrote(store: ChunkStore, folder: Path) -> None:
    other = ChunkStore(store.folder)
    index(store, folder)
    assert found_files(other, "hottest") == ["planets.html"]
    assert index(other, folder) == (Update(), [])
    (folder / "planets.html").unlink()
    index(other, folder)
    assert found_files(store, "hottest") == []


def test_an_index_without_its_full_text_index_gets_one(store: ChunkStore, folder: Path) -> None:
    # What a kill between the two steps of making a table leaves.
    store._table.drop_index("words_idx")
    again = ChunkStore(store.folder)
    index(again, folder)
    assert found_files(again, "hottest") == ["planets.html"]


def test_a_damaged_or_impossible_index_is_one_clear_error(store: ChunkStore, tmp_path: Path) -> None:
    for file in (store.folder / "chunks.lance").rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    with pytest.raises(FolderError, match="if it is damaged, delete it"):
        ChunkStore(store.folder)
    (tmp_path / "a file").touch()
    with pytest.raises(FolderError, match="no index can be kept"):
        ChunkStore(tmp_path / "a file" / "index")


class ToyEmbedder:
    """Knows that a car is an automobile; every other text is about neither."""

    dimension = 2

    def embed_passages(self, texts: Sequence[str]) -> list[list[float]]:
        return [self.embed_question(text) for text in texts]

    def embed_question(self, text: str) -> list[float]:
        return [1.0, 0.0] if "car" in text.split() or "automobile" in text.split() else [0.0, 1.0]


def test_vectors_find_chunks_without_common_words_and_ranks_are_fused(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text('{"text": "my car"}\n{"text": "an automobile show"}\n{"text": "a show of horses"}\n')
    words, both = ChunkStore(tmp_path / "words"), ChunkStore(tmp_path / "both", ToyEmbedder())
    index(words, file)
    index(both, file)
    assert [chunk.text for chunk in words.search("automobile", 10)] == ["an automobile show"]
    found = both.search("automobile", 10)
    assert [chunk.text for chunk in found] == ["an automobile show", "my car", "a show of horses"]
    # Reciprocal rank fusion: first by words, and first or second by vectors, with the usual constant of 60.
    assert 1 / 61 + 1 / 62 - 1e-6 <= found[0].score <= 2 / 61 + 1e-6
    assert both.search("", 2)[0].text == "a show of horses"


def test_many_files_go_in_by_several_commits(
    store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_NUM_CHUNKS_A_COMMIT", 7)
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"word{number} all")
    index(store, tmp_path)
    assert len(store) == 30
    assert found_files(store, "word17") == ["17.txt"]
    assert len(store.search("all", 50)) == 30


def test_skipped_files_are_no_obstacle_to_the_splitter(store: ChunkStore, folder: Path) -> None:
    def skip_half_way(file: SourceFile) -> Iterator[Chunk]:
        yield Chunk("the first half")
        raise SkippedFileError("the second half is broken")

    update = store.update(find_files([folder / "guide.md"]), skip_half_way)
    assert update.skipped == [("guide.md", "the second half is broken")]
    assert len(store) == 0
