"""Parsing requests from lines of JSON, and recognising input in other formats."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple

from bge_rerank_integrations.errors import DatasetError
from bge_rerank_integrations.evaluation.datasets import join_title

REQUEST_FORM: Final = '{"query": "...", "passages": ["...", "..."]}'

# Clients of other rerankers use the names `documents` and `texts` for the list of passages.
_PASSAGE_KEYS: Final = ("passages", "documents", "texts")

_UNPACK: Final = "unpack it first: `{} FILE`"
# The first bytes of files in binary formats, the name of the format and advice.
_BINARY_FORMATS: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"\x1f\x8b", "gzip", _UNPACK.format("gunzip --keep")),
    (b"BZh", "bzip2", _UNPACK.format("bunzip2 --keep")),
    (b"\xfd7zXZ\0", "xz", _UNPACK.format("unxz --keep")),
    (b"\x28\xb5\x2f\xfd", "zstd", _UNPACK.format("unzstd")),
    (b"PK\x03\x04", "zip (or an Excel workbook)", _UNPACK.format("unzip")),
    (b"PAR1", "Parquet", "write its rows as JSONL first"),
    (b"ARROW1", "Arrow", "write its rows as JSONL first"),
    (b"SQLite format 3\0", "an SQLite database", "write its rows as JSONL first"),
    (b"%PDF", "PDF", "a PDF contains no requests"),
)
_LONGEST_SIGNATURE: Final = 16


class MalformedInputError(DatasetError):
    """The input contains no requests, or is not JSONL."""


class MalformedLineError(MalformedInputError):
    """A line of the input is not a request.

    Attributes:
        line: Number of the line, from 1.
        reason: What is wrong with the line.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class Passage(NamedTuple):
    """One passage of a request.

    Attributes:
        text: The passage's text, without its title.
        id: The caller's id for the passage, or None.
        title: The passage's title, or None.
    """

    text: str
    id: str | int | None = None
    title: str | None = None


@dataclass(frozen=True)
class Request:
    """One request, parsed from one line of the input.

    Attributes:
        line: Number of the line, from 1.
        id: The caller's id for the request, or None.
        query: The query.
        passages: The passages to rank.
    """

    line: int
    id: str | int | None
    query: str
    passages: list[Passage]

    @property
    def texts(self) -> list[str]:
        """The text that the model scores for each passage: the title, if any, a space and the text."""
        return [join_title(passage.title, passage.text) for passage in self.passages]


def parse_request(line: int, raw: bytes) -> Request:
    r"""Parse one line, such as `{"query": "...", "passages": ["...", {"id": 7, "text": "..."}], "id": 1}`.

    The list of passages can also be called `documents` or `texts`. A passage is a string, or an object with
    a string `text` and an optional `title`. If there is a title, the model scores the title, a space and the
    text. `_id` is read as `id`, so a line of a BEIR corpus is a valid passage.

    Args:
        line: Number of the line, from 1.
        raw: The line's bytes.

    Raises:
        MalformedLineError: The line is not a request. The message says what is wrong and where, and never
            contains the text.

    Example:
        >>> parse_request(1, b'{"query": "a panda?", "passages": ["a bear", "a car"]}').texts
        ['a bear', 'a car']
    """
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise MalformedLineError(line, "not UTF-8") from None
    except (ValueError, RecursionError):
        raise MalformedLineError(line, "not valid JSON") from None
    if not isinstance(row, dict):
        raise MalformedLineError(line, "not a JSON object")
    key = _passage_key(line, row)
    if not isinstance(row["query"], str):
        raise MalformedLineError(line, "`query` is not a string")
    if not row["query"].strip():
        raise MalformedLineError(line, "`query` is blank")
    if not isinstance(row[key], list):
        raise MalformedLineError(line, f"`{key}` is not a list")
    passages = [_passage(line, f"`{key}[{index}]`", value) for index, value in enumerate(row[key])]
    return Request(line, _identifier(line, "the request", row), row["query"], passages)


def check_format(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Verify that the first line is not in a binary format, and return the same lines.

    Args:
        lines: The lines of a file or a pipe.

    Raises:
        MalformedInputError: The input is compressed, UTF-16 or in another format that is not UTF-8 text.
    """
    lines = iter(lines)
    first = next(lines, b"")
    beginning = first[:_LONGEST_SIGNATURE]
    for signature, name, advice in _BINARY_FORMATS:
        if beginning.startswith(signature):
            raise MalformedInputError(f"the input is {name}, not JSONL; {advice}")
    encoding = json.detect_encoding(beginning)
    if not encoding.startswith("utf-8"):
        name = encoding.upper()[: len("utf-16")]
        raise MalformedInputError(
            f"the input is {name}, not UTF-8; convert it first: `iconv -f {name} -t UTF-8 FILE > NEW`"
        )
    return chain([first] if first else [], lines)


def no_requests(first: bytes, error: MalformedLineError | None) -> MalformedInputError:
    """Return the error for an input without requests. Its message guesses the format of the input.

    Args:
        first: The first line that is not blank, or empty bytes if there is none.
        error: The error of the malformed line that was found first, or None if there is none.
    """
    if error is None:
        return MalformedInputError("the input is empty")
    reason = _likely_format(first) or error
    return MalformedInputError(
        f"no line of the input is a request: {reason}. A request is one line of JSON: `{REQUEST_FORM}`"
    )


def _likely_format(first: bytes) -> str | None:
    text = first.removeprefix(codecs.BOM_UTF8).strip()
    if text.startswith(b"["):
        return "it looks like a JSON array; `jq -c '.[]' FILE` writes one line for each item"
    if text == b"{":
        return "it looks like JSON over several lines; `jq -c . FILE` writes one line for each object"
    if not text.startswith(b"{") and any(separator in text for separator in (b",", b"\t", b";")):
        return "it looks like CSV"
    return None


def _passage_key(line: int, row: dict[str, Any]) -> str:
    if "query" not in row:
        raise MalformedLineError(line, "`query` is missing")
    given = [key for key in _PASSAGE_KEYS if key in row]
    if not given:
        raise MalformedLineError(line, "`passages` is missing (or `documents`, or `texts`)")
    if len(given) > 1:
        names = " and ".join(f"`{key}`" for key in given)
        raise MalformedLineError(line, f"{names} are both given; a request has only one of them")
    return given[0]


def _passage(line: int, where: str, value: object) -> Passage:
    if isinstance(value, str):
        return Passage(value)
    if not isinstance(value, dict):
        raise MalformedLineError(line, f"{where} is neither a string nor an object with a string `text`")
    if "text" not in value:
        raise MalformedLineError(line, f"{where} has no `text`")
    if not isinstance(value["text"], str):
        raise MalformedLineError(line, f"the `text` of {where} is not a string")
    title = value.get("title")
    if not isinstance(title, str | None):
        raise MalformedLineError(line, f"the `title` of {where} is not a string")
    return Passage(value["text"], _identifier(line, where, value), title)


def _identifier(line: int, where: str, row: dict[str, Any]) -> str | int | None:
    given = [row[key] for key in ("id", "_id") if row.get(key) is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise MalformedLineError(line, f"{where} has both an `id` and an `_id`, which differ")
    value = given[0] if given else None
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise MalformedLineError(line, f"the `id` of {where} is neither a string nor a whole number")
    return value
