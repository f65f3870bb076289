"""Warnings that are logged at most once per process."""

from __future__ import annotations

import logging

# No lock protects it, because a forked child would wait for ever for a lock that another thread held.
_logged: dict[str, object] = {}


def warn_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, unless this process has already logged one with the same message.

    Args:
        logger: The logger that receives the warning.
        message: A format string. It identifies the warning, whatever the arguments are.
        args: Arguments of the format string: numbers and names of options, never the text of a user.
    """
    mine = object()
    if _logged.setdefault(message, mine) is mine:  # `setdefault` is atomic
        logger.warning(message, *args)
