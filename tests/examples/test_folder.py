"""Finding and reading documents."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest

from examples import folder as folder_module
from examples.folder import FolderError, SkippedFileError, find_files, read_pages, split_sections
from tests.examples.conftest import make_pdf


def names(paths: list[Path]) -> list[str]:
    return [file.name for file in find_files(paths)]


def test_documents_are_found_below_a_folder_and_named_from_it(folder: Path) -> None:
    for left_out in (".git/notes.md", "node_modules/x/README.md", ".hidden.md", "image.png", "code.py"):
        path = folder / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a document")
    environment = folder / "env" / "lib"
    environment.mkdir(parents=True)
    (folder / "env" / "pyvenv.cfg").touch()
    (environment / "LICENSE.txt").write_text("of somebody else")
    (folder / "folder.md").mkdir()
    expected = ["facts.jsonl", "guide.md", "planets.html", "report.pdf", "sub/panda.txt"]
    assert names([folder]) == expected
    assert names([folder, folder / "sub"]) == expected
    assert names([folder / "sub", folder / "guide.md"]) == ["guide.md", "sub/panda.txt"]
    assert names([folder / "guide.md"]) == ["guide.md"]


def test_a_stamp_changes_with_the_file(folder: Path) -> None:
    file = folder / "guide.md"
    [before] = find_files([file])
    os.utime(file, ns=(1, 1))
    [touched] = find_files([file])
    file.write_text("longer" * 100)
    os.utime(file, ns=(1, 1))
    [rewritten] = find_files([file])
    assert len({before.stamp, touched.stamp, rewritten.stamp}) == 3


def test_a_folder_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="does not exist"):
        find_files([tmp_path / "none"])
    with pytest.raises(FolderError, match="no document"):
        find_files([tmp_path])


@pytest.mark.skipif(os.name != "posix", reason="such names are impossible elsewhere")
def test_a_name_that_is_not_utf8_is_made_readable(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("A text.")
    except OSError:
        pytest.skip("the file system refuses such names")
    assert names([tmp_path]) == ["caf\N{REPLACEMENT CHARACTER}.txt"]


def test_html_becomes_markdown_that_keeps_sentences_and_headings(folder: Path) -> None:
    [page] = read_pages(folder / "planets.html")
    assert page.is_markdown
    assert "Venus is the **hottest** planet." in page.text
    assert [heading for heading, _ in split_sections(page.text)] == [
        "Planets > Venus",
        "Planets > Mars",
    ]
    assert "Home" not in page.text
    assert "color" not in page.text


def test_the_title_of_html_without_headings_is_its_heading(tmp_path: Path) -> None:
    file = tmp_path / "page.htm"
    file.write_bytes('<meta charset="latin-1"><title>Caf\xe9</title><p>Closed.</p>'.encode("latin-1"))
    [page] = read_pages(file)
    assert page.text == "# Café\n\nClosed."


def test_a_pdf_has_a_page_for_each_of_its_pages_with_text(tmp_path: Path) -> None:
    file = tmp_path / "report.pdf"
    file.write_bytes(make_pdf("First.", "", "Third."))
    assert [(page.number, page.text.strip()) for page in read_pages(file)] == [(1, "First."), (3, "Third.")]


@pytest.mark.parametrize("bom", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b""])
def test_text_is_read_with_any_byte_order_mark(tmp_path: Path, bom: bytes) -> None:
    encoding = "utf-16-le" if bom == codecs.BOM_UTF16_LE else "utf-8"
    file = tmp_path / "notes.txt"
    file.write_bytes(bom + "# Größe\r\nzwei".encode(encoding))
    [page] = read_pages(file)
    assert (page.text, page.is_markdown) == ("# Größe\nzwei", False)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("scan.pdf", make_pdf("", ""), "no text; a scan needs OCR"),
        ("broken.pdf", make_pdf("A text.")[:100], "no PDF that can be read"),
        ("not.pdf", b"hello", "no PDF that can be read"),
        ("empty.pdf", b"", "no PDF that can be read"),
        ("binary.md", b"\x89PNG\0\0\0", "binary"),
        ("binary.html", b"\x7fELF\0\0\0", "binary"),
        ("legacy.txt", "Größe".encode("latin-1"), "not text in UTF-8"),
        ("empty.md", b" \n", "holds no text"),
        ("deep.html", b"<div>" * 5000 + b"x", "nested too deeply"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "x"}\n', "line 1 has no `text`"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(SkippedFileError, match=reason):
        read_pages(file)


def test_a_file_that_is_gone_or_too_large_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkippedFileError, match="vanished"):
        read_pages(tmp_path / "gone.md")
    (tmp_path / "large.md").write_text("more than four bytes")
    monkeypatch.setattr(folder_module, "MAX_FILE_BYTES", 4)
    with pytest.raises(SkippedFileError, match="larger than"):
        read_pages(tmp_path / "large.md")


def test_headings_in_code_are_none_and_levels_may_be_left_out() -> None:
    markdown = "# A\n```\n# no\n~~~\n# no\n```\n### B ##\n#no\n## C\n````\n```\n# no\n````\n# D\n\n# E\n  x\n"
    assert split_sections(markdown) == [
        ("A", "```\n# no\n~~~\n# no\n```\n"),
        ("A > B", "#no\n"),
        ("A > C", "````\n```\n# no\n````\n"),
        ("E", "  x\n"),
    ]
    assert split_sections("no heading\n") == [("", "no heading\n")]


def test_any_line_separator_of_unicode_may_stand_in_a_json_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "bamboo\u2028They\x85eat\u2029"}\r\n{"text": "tea"}', encoding="utf-8", newline=""
    )
    assert [page.text for page in read_pages(file)] == ["bamboo\u2028They\x85eat\u2029", "tea"]
