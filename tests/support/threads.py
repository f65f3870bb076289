"""Runs functions in new threads, or refuses to start any."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_new_thread(function: Callable[[], object]) -> None:
    """Run a function in a new thread and wait for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def refuse_to_start(*_: object) -> None:
    """Do what `Thread.start` and `start_new_thread` do in a process with too many threads."""
    raise RuntimeError("can't start new thread")
