"""Which process scores: what a model runs on, thread pools or a GPU, does not survive a fork."""

from __future__ import annotations

import os

from bge_rerank_integrations.errors import ForkedProcessError

_process_in_use: int | None = None


def mark_process_in_use() -> None:
    """Note that thread pools or a GPU are in use here, so that a forked child must not use them."""
    global _process_in_use
    _process_in_use = os.getpid()


def was_forked() -> bool:
    """Whether this is a child that was forked after its parent had loaded a model."""
    return _process_in_use not in (None, os.getpid())


def check_process() -> None:
    """Raise `ForkedProcessError` in a child that was forked after its parent had loaded a model."""
    if was_forked():
        raise ForkedProcessError(
            "this process was forked from one that had loaded a model, and neither CUDA nor a CPU's thread "
            "pool survives a fork. Load the model in the child: in gunicorn's post_fork hook (and without "
            "--preload), on Celery's worker_process_init signal, in the worker_init_fn of a torch "
            "DataLoader. Or start children with the 'spawn' method"
        )
