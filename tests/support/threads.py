"""Runs functions in new threads."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_new_thread(function: Callable[[], object]) -> None:
    """Run a function in a new thread and wait for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
