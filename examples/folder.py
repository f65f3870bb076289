"""Finds the documents in folders, and reads them as text: Markdown, plain text, HTML, PDF and JSON lines."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bge_rerank_integrations.errors import RerankError, missing_extra

try:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter
    from pypdf import PdfReader
except ImportError as error:
    raise missing_extra("examples", error.name or "pypdf") from error

MAX_FILE_BYTES = 64 * 2**20

_REPOSITORY = Path(__file__).parents[1]
# Not the README of the examples: it contains the questions that it shows how to ask.
DEFAULT_PATHS = tuple(
    _REPOSITORY / name for name in ("README.md", "docs", "examples/corpus.jsonl", "benchmarks")
)

_HEADING = re.compile(r"(#{1,6})\s+(.+?)[\s#]*$")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")

logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns about every irregularity of a file


class FolderError(RerankError):
    """A folder does not exist, or it contains no document."""


class SkippedFileError(Exception):
    """A file cannot be read. The message has the reason but not the name of the file."""


@dataclass(frozen=True)
class SourceFile:
    """A file to index.

    Attributes:
        path: Where it is.
        name: What it is called in results: its path below the folder.
        stamp: Changes whenever the file does.
    """

    path: Path
    name: str
    stamp: str


@dataclass(frozen=True)
class Page:
    """A part of a file with its own title or page number.

    Attributes:
        text: Plain text, or Markdown.
        number: Page of a PDF, from 1.
        heading: Title of the whole part; a Markdown file's headings are in its text instead.
        is_markdown: Whether lines that start with `#` are headings.
    """

    text: str
    number: int | None = None
    heading: str = ""
    is_markdown: bool = False


def find_files(paths: Sequence[Path]) -> list[SourceFile]:
    """Return the documents in folders, in a fixed order.

    Hidden files and folders, virtual environments and `node_modules` are left out, and so are files whose
    suffix says that they are something else.

    Args:
        paths: Folders, or single files.

    Raises:
        FolderError: A path does not exist, or there is no document in any.
    """
    for path in paths:
        if not path.exists():
            raise FolderError(f"{str(path)!r} does not exist")
    found = sorted({file for path in paths for file in _walk(path.resolve())})
    if not found:
        names = ", ".join(str(path) for path in paths)
        raise FolderError(f"there is no document in {names}: looked for {', '.join(_READERS)}")
    roots = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    base = None
    with suppress(ValueError):  # folders on two drives of Windows have nothing in common
        base = Path(os.path.commonpath(roots))
    return [file for path in found if (file := _describe(path, base)) is not None]


def read_pages(path: Path) -> list[Page]:
    """Read a document without its empty pages.

    Raises:
        SkippedFileError: It holds no text, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SkippedFileError(f"it is larger than {MAX_FILE_BYTES // 2**20} MiB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise SkippedFileError("it has vanished") from None
    except OSError as error:
        raise SkippedFileError(f"it cannot be read: {error.strerror}") from error
    suffix = path.suffix.lower()
    pages = [page for page in _READERS[suffix](data) if page.text.strip()]
    if not pages:
        raise SkippedFileError("it holds no text" + ("; a scan needs OCR first" if suffix == ".pdf" else ""))
    return pages


def split_sections(markdown: str) -> list[tuple[str, str]]:
    r"""Return the sections of a Markdown text: the headings that lead to each, and its text without them.

    Example:
        >>> split_sections("Hi.\n# Guide\nRead.\n## Install\nUnpack.\n")
        [('', 'Hi.\n'), ('Guide', 'Read.\n'), ('Guide > Install', 'Unpack.\n')]
    """
    sections: list[tuple[str, list[str]]] = [("", [])]
    above: list[tuple[int, str]] = []
    fence = ""
    for line in markdown.splitlines(keepends=True):
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence):
                fence = ""
        elif not fence and (match := _HEADING.match(line)):
            level = len(match[1])
            above = [*(heading for heading in above if heading[0] < level), (level, match[2])]
            sections.append((" > ".join(text for _, text in above), []))
            continue
        sections[-1][1].append(line)
    return [(path, text) for path, lines in sections if (text := "".join(lines)).strip()]


def _walk(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield from [path] if path.suffix.lower() in _READERS else []
        return
    for folder, subfolders, names in os.walk(path):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not _is_left_out(here / name)]
        for name in names:
            file = here / name
            if not name.startswith(".") and file.suffix.lower() in _READERS and file.is_file():
                yield file


def _is_left_out(folder: Path) -> bool:
    name = folder.name
    return name.startswith(".") or name == "node_modules" or (folder / "pyvenv.cfg").exists()


def _describe(path: Path, base: Path | None) -> SourceFile | None:
    try:
        status = path.stat()
    except OSError:  # the file was removed after it was found
        return None
    # File names are not valid UTF-8 on every system, but the index accepts only UTF-8.
    shown = path if base is None else path.relative_to(base)
    name = os.fsencode(shown.as_posix()).decode("utf-8", "replace")
    return SourceFile(path, name, f"{status.st_mtime_ns}-{status.st_size}")


def _read_text(data: bytes) -> list[Page]:
    return [Page(_decode(data))]


def _read_markdown(data: bytes) -> list[Page]:
    return [Page(_decode(data), is_markdown=True)]


def _read_html(data: bytes) -> list[Page]:
    """Convert HTML to Markdown, so that headings, lists, tables and code keep their meaning.

    Both frameworks have splitters for HTML. LangChain's take the words of a sentence apart where it holds
    a link or emphasis; LlamaIndex's leaves out text outside of a list of tags, and forgets the headings.
    """
    if b"\0" in data and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SkippedFileError("it is binary")
    soup = BeautifulSoup(data, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup(["head", "title", "script", "style", "template", "noscript", "nav"]):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style="ATX", strip=["a", "img"], escape_asterisks=False, escape_underscores=False
    )
    try:
        text = converter.convert_soup(soup)
    except RecursionError:
        raise SkippedFileError("its elements are nested too deeply") from None
    return [Page(text if soup.h1 or not title else f"# {title}\n\n{text}", is_markdown=True)]


def _read_pdf(data: bytes) -> list[Page]:
    try:
        pages = PdfReader(io.BytesIO(data)).pages
        return [Page(page.extract_text(), number=number) for number, page in enumerate(pages, start=1)]
    except Exception as error:  # pypdf raises errors of many types for a broken file
        raise SkippedFileError(f"it is no PDF that can be read: {error}") from error


def _read_json_lines(data: bytes) -> list[Page]:
    pages = []
    for number, line in enumerate(_decode(data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise SkippedFileError(f"line {number} is not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise SkippedFileError(f"line {number} has no `text`")
        pages.append(Page(row["text"], heading=str(row.get("title") or "")))
    return pages


def _decode(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data:
        raise SkippedFileError("it is binary")
    else:
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise SkippedFileError("it is not text in UTF-8") from None


_READERS = {
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".txt": _read_text,
    ".rst": _read_text,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".jsonl": _read_json_lines,
}
