"""Warnings that are logged at most once per process."""

from __future__ import annotations

import logging

from bge_rerank_integrations.runtime.locks import SafeLock

_logged: set[str] = set()
_lock = SafeLock()


def warn_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, unless this process has already logged one with the same message.

    Args:
        logger: The logger that receives the warning.
        message: A format string. It identifies the warning, whatever the arguments are.
        args: Arguments of the format string: numbers and names of options, never the text of a user.
    """
    with _lock:
        if message in _logged:
            return
        _logged.add(message)
    logger.warning(message, *args)
