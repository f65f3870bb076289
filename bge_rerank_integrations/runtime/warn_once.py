"""Warnings that a process logs once, however often their reason occurs."""

from __future__ import annotations

import logging
import threading

_logged: set[str] = set()
_lock = threading.Lock()


def warn_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, unless this process has logged one with the same message before.

    Args:
        logger: Where to.
        message: A format string. It identifies the warning; the arguments do not.
        args: What the message is formatted with: numbers and names of options, never a text.
    """
    with _lock:
        if message in _logged:
            return
        _logged.add(message)
    logger.warning(message, *args)
