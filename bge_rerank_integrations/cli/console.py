"""The terminal: printing never raises, and lines fit its width."""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import unicodedata
from pathlib import Path
from typing import Final

import click

WIDTH: Final = 80
"""Columns that output may take; the narrowest terminal in common use."""

_COMMAND: Final = re.compile("""`[^`]*`|pip install "[^"]*\"""")
_KEPT_SPACE: Final = "\0"
_LAST_STANDARD_STREAM: Final = 2


def prepare_streams() -> None:
    """Make sure that printing never raises, whatever the console's encoding and whatever is closed.

    A character that the encoding lacks is printed as its escape, such as `\\u4ec0`. A closed stderr
    swallows messages. A closed stdout stays None, which `require_stdout` reports.
    """
    # A file takes the lowest free number. Those of closed standard streams are taken first, since libraries
    # write to 1 and 2 without asking, and that must not go into a file of ours.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD_STREAM:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def require_stdout() -> None:
    """Raise `ClickException` if stdout is closed, before work is done whose results would be lost."""
    if sys.stdout is None:
        raise click.ClickException("standard output is closed, so the results could not be printed")


def wrap(text: str, *, indent: int = 0) -> str:
    """Break a text into lines of at most `WIDTH` columns.

    What stands in backticks, and a `pip install`, stay on one line, so that they can be copied.

    Args:
        text: One paragraph.
        indent: Spaces before each line but the first.
    """
    kept = _COMMAND.sub(lambda match: match.group().replace(" ", _KEPT_SPACE), text)
    lines = textwrap.wrap(
        kept, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_KEPT_SPACE, " ")


def cut(text: str, width: int) -> str:
    """Return a text as one line of at most `width` columns, `...` at its end where something is missing.

    East Asian characters take two columns. A character that moves the cursor or cannot be printed
    becomes `?`.
    """
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    if sum(map(_columns, line)) <= width:
        return line
    room = width - len("...")
    end = 0
    while end < len(line) and (room := room - _columns(line[end])) >= 0:
        end += 1
    return line[:end] + "..."


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
