"""Documents for training, each with a title and a text, from the pinned sources."""

from __future__ import annotations

import ast
import inspect
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from training import sources


class Document(NamedTuple):
    """A document that queries and passages are generated from."""

    title: str
    text: str


_MIN_CHARACTERS = 120
_MAX_CHARACTERS = 4000


def documents(cache: Path) -> dict[str, list[Document]]:
    """Return the distinct documents of each source, in a fixed order."""
    return {
        "descriptions": _distinct(_descriptions(sources.fetch_descriptions(cache))),
        "articles": _distinct(_articles(sources.fetch_articles(cache))),
        "docstrings": _distinct(
            document
            for wheel in sources.DOCUMENTED
            for document in _docstrings(sources.fetch_wheel(wheel, cache))
        ),
    }


def _distinct(documents: Iterable[Document]) -> list[Document]:
    found: dict[str, Document] = {}
    for document in documents:
        if len(document.text) >= _MIN_CHARACTERS:
            found.setdefault(document.text[:400], Document(document.title, document.text[:_MAX_CHARACTERS]))
    return list(found.values())


def _descriptions(translation: str) -> Iterator[Document]:
    for record in translation.split("\n\n"):
        _, _, description = record.partition("\nDescription-en: ")
        title, _, body = description.partition("\n")
        lines = (line.strip() for line in body.splitlines())
        yield Document(title.strip(), " ".join("" if line == "." else line for line in lines).strip())


def _articles(export: bytes) -> Iterator[Document]:
    title = ""
    for element in ElementTree.fromstring(export).iter():
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        elif tag == "text" and element.text and not element.text.lower().startswith("#redirect"):
            section = ""
            for line in _plain(element.text).splitlines():
                if heading := re.fullmatch(r"\s*=+\s*(.*?)\s*=+\s*", line):
                    section = heading.group(1)
                elif len(line) >= 2 * _MIN_CHARACTERS:
                    yield Document(f"{title} {section}".strip(), line.strip())


def _plain(markup: str) -> str:
    for _ in range(6):  # each pass removes the innermost templates and tables
        markup = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", markup)
    markup = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->", "", markup, flags=re.S)
    markup = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", markup)
    markup = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", markup)
    markup = re.sub(r"\[https?://\S+\s*([^\]]*)\]", r"\1", markup)
    return re.sub(r"'{2,}|<[^>]+>|&nbsp;", "", markup)


def _docstrings(wheel: Path) -> Iterator[Document]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or "/tests/" in name:
                continue
            try:
                module = ast.parse(archive.read(name))
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(module):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
                    summary, _, body = docstring.partition("\n\n")
                    if body:
                        yield Document(" ".join(summary.split()), " ".join(body.split()))
