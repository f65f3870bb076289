"""Run one contender in its own process, to measure its peak memory."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from benchmarks.common import Pairs, quiet
from benchmarks.models import Setup
from benchmarks.peers.registry import load, needs_preparing, prepare

P = ParamSpec("P")
T = TypeVar("T")


def peak_bytes(key: str, setup: Setup, pairs: Pairs, batch_size: int | None) -> dict[str, int]:
    """Load a contender in its own process, score pairs once, and return its peak memory.

    Args:
        key: Key of the contender.
        setup: The model to load.
        pairs: The pairs to score.
        batch_size: Pairs per batch. None means the contender's default.

    Returns:
        `peak_bytes` is the peak memory of the process. `before_bytes` is the part that the interpreter and
        torch used before the model was loaded. On CUDA, `peak_gpu_bytes` is the peak GPU memory.

    Raises:
        NotAvailableError: The contender is not installed, or this machine cannot run it.
    """
    if needs_preparing(key):
        _alone(_prepare, key, setup)  # in another process, since conversion takes more memory than scoring
    return _alone(_peak, key, setup, pairs, batch_size)


def _alone(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _prepare(key: str, setup: Setup) -> None:
    with quiet():
        prepare(key, setup)


def _peak(key: str, setup: Setup, pairs: Pairs, batch_size: int | None) -> dict[str, int]:
    before = _own_peak_bytes()
    with quiet(), ExitStack() as stack:
        contender = load(key, setup, stack)
        contender.batch_size = batch_size
        contender.score(pairs)
        measured = {"peak_bytes": _own_peak_bytes(), "before_bytes": before}
        if setup.on_cuda:
            measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        return measured


def _own_peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` below also counts the parent's memory at the time of the start
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
