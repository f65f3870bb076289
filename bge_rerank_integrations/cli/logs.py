"""Log records on stderr, with settings named as options of the command line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click

from bge_rerank_integrations.cli.console import wrap
from bge_rerank_integrations.cli.options import name_options


class _Formatter(logging.Formatter):
    """Formats a record as one line, with options instead of settings."""

    def format(self, record: logging.LogRecord) -> str:
        return name_options(super().format(record))


class _WrappingFormatter(_Formatter):
    """Formats a record as a paragraph that fits the terminal's width."""

    def format(self, record: logging.LogRecord) -> str:
        return wrap(super().format(record))


class _StderrHandler(logging.Handler):
    """Prints records on the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            click.echo(self.format(record), err=True)
        except Exception:
            self.handleError(record)


def _is_not_printed_already(record: logging.LogRecord) -> bool:
    """Return False for records of the hub library, which prints its records itself."""
    return record.name.partition(".")[0] != "huggingface_hub"


_HANDLER: Final = _StderrHandler()
_HANDLER.addFilter(_is_not_printed_already)


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print the warnings that are logged in this block, as messages for the user of a command."""
    _HANDLER.setFormatter(_WrappingFormatter())
    _HANDLER.setLevel(logging.WARNING)
    logging.getLogger().addHandler(_HANDLER)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(_HANDLER)


def log_with_time() -> None:
    """Print all log records from now on, one line for each, with time and level."""
    _HANDLER.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    _HANDLER.setLevel(logging.NOTSET)
    logging.getLogger("bge_rerank_integrations").setLevel(logging.INFO)
