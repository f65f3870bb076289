"""Figure 12: memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks.stress.common import PATIENCE_S, Bench, Outcome
from bge_rerank_integrations import Scorer

MAX_GROWTH: Final = 0.05


def memory_growth(bench: Bench) -> Outcome:
    """Requests of ever other lengths, no passage twice, must not make a process of their own grow."""
    num_requests = bench.count(100_000)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        loaded, warm, grown = pool.submit(
            _memory_over_requests, bench.checkpoint, bench.phrases(), num_requests
        ).result()
    growth = grown / warm - 1
    return Outcome(
        growth <= MAX_GROWTH,
        f"{num_requests} requests: {loaded / 2**20:.0f} MiB before the first, {warm / 2**20:.0f} after a "
        f"fifth, {grown / 2**20:.0f} at the end: {100 * growth:+.1f} %",
    )


def _memory_over_requests(checkpoint: Path, phrases: list[str], num_requests: int) -> tuple[int, int, int]:
    """Return what this process holds before the first request, after a fifth of them and after the last."""
    with Scorer(checkpoint, device="cpu") as scorer, ThreadPoolExecutor(4) as pool:

        def call(n: int) -> None:
            rng = random.Random(n)
            passages = [f"{phrase} {n}" for phrase in rng.sample(phrases, rng.randrange(1, 5))]
            scorer.rank(rng.choice(phrases), passages)

        loaded = _resident_bytes()
        for n in range(num_requests // 5):
            _bounded(pool, call, n)
        warm = _resident_bytes()
        for n in range(num_requests // 5, num_requests):
            _bounded(pool, call, n)
        return loaded, warm, _resident_bytes()


def _bounded(pool: ThreadPoolExecutor, call: Callable[[int], None], n: int) -> None:
    """Hand a call to a pool and, each hundredth time, wait for those before."""
    future = pool.submit(call, n)
    if n % 100 == 99:
        future.result(PATIENCE_S)


def _resident_bytes() -> int:
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # the peak, where nothing better is to be had

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
