"""Detects forked processes, in which the thread pools and the GPU context of a loaded model do not work."""

from __future__ import annotations

import os
from collections.abc import Callable

from bge_rerank_integrations.errors import ForkedProcessError

_process_in_use: int | None = None
_is_child = False


def mark_process_in_use() -> None:
    """Record that this process uses thread pools or a GPU, which a forked child process cannot use."""
    global _process_in_use
    _process_in_use = os.getpid()


def was_forked() -> bool:
    """Return whether this process was forked from a process that had loaded a model."""
    return _process_in_use not in (None, os.getpid())


def is_child() -> bool:
    """Return whether this process was forked from another one after this module was imported."""
    return _is_child


def check_process() -> None:
    """Raise `ForkedProcessError` if this process was forked from a process that had loaded a model."""
    if was_forked():
        raise ForkedProcessError(
            "this process was forked from a process that had loaded a model, and neither CUDA nor CPU thread "
            "pools work after a fork. Load the model in the child process instead: in gunicorn's "
            "post_worker_init hook, on Celery's worker_process_init signal, or in the worker_init_fn of a "
            "torch DataLoader. Alternatively, start child processes with the 'spawn' method"
        )


def call_in_forked_children(function: Callable[[], object]) -> None:
    """Call a function in each process that is forked from this one, before anything else runs there."""
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=function)


def _become_child() -> None:
    global _is_child
    _is_child = True


call_in_forked_children(_become_child)
