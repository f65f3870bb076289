"""Memory over many requests, and of a long job."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from bge_rerank_integrations import Scorer
from tests.stress.common import PATIENCE_S, Bench, check

MAX_GROWTH: Final = 0.05
MAX_ABOVE_MODEL_MB: Final = 300.0

# This code runs in a small process of its own. The peak memory of a process counts its parent's memory at the
# time of the start, so a child of a large process would always have a large peak.
RANK: Final = """
    import os, shutil, subprocess, sys, time
    model, source, output = sys.argv[1:]
    command = [sys.executable, "-m", "bge_rerank_integrations.cli", "rank", "--model", model]
    ranking = subprocess.Popen([*command, "--device", "cpu", "-o", output], stdin=subprocess.PIPE)
    with open(source, "rb") as lines, ranking.stdin:
        # The command reads the first line to check the format. It writes this file after it has loaded the
        # model, and then waits for more lines.
        ranking.stdin.write(lines.readline())
        ranking.stdin.flush()
        while not os.path.exists(output + ".job.json") and ranking.poll() is None:
            time.sleep(0.05)
        with open(f"/proc/{ranking.pid}/statm") as statm:
            loaded = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        shutil.copyfileobj(lines, ranking.stdin)
    _, status, usage = os.wait4(ranking.pid, 0)
    print(loaded, usage.ru_maxrss * 1024, status)
"""


@pytest.mark.stress
def test_memory_does_not_grow_over_requests_of_varying_shape(bench: Bench) -> None:
    num_requests = 100_000
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        loaded, warm, grown = pool.submit(
            _memory_over_requests, bench.checkpoint, bench.phrases(), num_requests
        ).result()
    growth = grown / warm - 1
    check(
        growth <= MAX_GROWTH,
        f"{num_requests} requests: {loaded / 2**20:.0f} MiB before the first, {warm / 2**20:.0f} MiB after a "
        f"fifth of them, {grown / 2**20:.0f} MiB at the end: {100 * growth:+.1f} %",
    )


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the memory of another process")
def test_a_job_of_100_000_pairs_needs_little_memory(bench: Bench) -> None:
    source, output = bench.folder / "job.jsonl", bench.folder / "ranked.jsonl"
    num_rows, phrases = 2000, bench.phrases()
    with source.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            passages = [f"{phrases[(row + n) % len(phrases)]} {row} {n}" for n in range(50)]
            file.write(json.dumps({"query": phrases[row % len(phrases)], "passages": passages}) + "\n")
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RANK), bench.checkpoint, source, output],
        capture_output=True,
        text=True,
        check=True,
        timeout=10 * PATIENCE_S,
    )
    loaded, peak, status = map(int, completed.stdout.split())
    with output.open(encoding="utf-8") as file:
        num_ranked = sum(1 for _ in file)
    above_mb = (peak - loaded) / 1e6
    check(
        status == 0 and num_ranked == num_rows and above_mb <= MAX_ABOVE_MODEL_MB,
        f"{num_ranked * 50} pairs: {loaded / 1e6:.0f} MB with the model loaded, {peak / 1e6:.0f} MB at the "
        f"peak: {above_mb:+.0f} MB",
    )


def _memory_over_requests(checkpoint: Path, phrases: list[str], num_requests: int) -> tuple[int, int, int]:
    """Return this process's memory in bytes before the first request, after a fifth and after all of them."""
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
    """Submit a call to a pool. Wait for every hundredth call, so that the pool's queue stays short."""
    future = pool.submit(call, n)
    if n % 100 == 99:
        future.result(PATIENCE_S)


def _resident_bytes() -> int:
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # only the peak is available here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
