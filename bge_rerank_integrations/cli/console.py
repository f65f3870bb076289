"""Printing to a terminal: it never raises, and lines fit the width."""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import unicodedata
from pathlib import Path
from typing import Any, Final

import click

WIDTH: Final = 80
"""Most columns of an output line. 80 is the narrowest terminal in common use."""

_COMMAND: Final = re.compile("""`[^`]*`|pip install "[^"]*\"""")
_KEPT_SPACE: Final = "\0"
_LAST_STANDARD_STREAM: Final = 2


def prepare_streams() -> None:
    """Make sure that printing never raises, even in a limited encoding or with a closed stream.

    A character that the encoding lacks is printed as its escape, such as `\\u4ec0`. Messages that cannot be
    written to stderr are discarded, for example if it is closed or its disk is full. If stdout is closed,
    `sys.stdout` stays None, and `require_stdout` reports it.
    """
    # A new file gets the lowest free descriptor. If a standard stream is closed, that could be 1 or 2, and
    # libraries write to 1 and 2 directly. This opens the null device on every closed standard descriptor, so
    # that such output cannot end up in a results file.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD_STREAM:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # lives as long as the process
    # A console of Windows is not a `FileIO`.
    elif isinstance(sys.stderr, io.TextIOWrapper) and isinstance(_raw(sys.stderr), io.FileIO):
        messages = io.BufferedWriter(_BestEffort(sys.stderr.fileno(), "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(messages, sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Write the rest of the output.

    Raises:
        OSError: It cannot be written. The rest is discarded, because Python would try again at exit and end
            with the status 120.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class _BestEffort(io.FileIO):
    """A file that discards what it cannot write."""

    def write(self, data: Any) -> int:
        try:
            num_written = super().write(data)
        except OSError:
            num_written = None
        return len(data) if num_written is None else num_written


def _raw(stream: io.TextIOWrapper) -> object:
    return getattr(stream.buffer, "raw", stream.buffer)  # there is no buffer with PYTHONUNBUFFERED


def require_stdout() -> None:
    """Raise `ClickException` if stdout is closed, before the command computes results it cannot print."""
    if sys.stdout is None:
        raise click.ClickException("standard output is closed, so the results could not be printed")


def wrap(text: str, *, indent: int = 0) -> str:
    """Break a text into lines of at most `WIDTH` columns.

    A command in backticks or a `pip install` command stays on one line, so that users can copy it.

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
    """Return a text as one line of at most `width` columns, with `...` at the end if it was shortened.

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
