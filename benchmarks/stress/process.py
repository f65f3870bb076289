"""Figures 16 and 17: the process exits or forks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Final

from benchmarks.stress.common import PATIENCE_S, Bench, Outcome

MAX_EXIT_S: Final = 5.0

EXIT: Final = """
    import sys, threading, time
    from bge_rerank_integrations import Scorer
    scorer = Scorer(sys.argv[1], device="cpu", max_batch_tokens=512)
    pairs = [("query", "word " * 300 + str(n)) for n in range(40)]
    while scorer.health().queued_requests < 100:
        threading.Thread(target=scorer.score, args=(pairs,), daemon=True).start()
    print(time.time())
"""

FORK: Final = """
    import os, sys, time
    from bge_rerank_integrations import Scorer
    from bge_rerank_integrations.errors import ForkedProcessError
    scorer = Scorer(sys.argv[1], device="cpu")
    scorer.score([("a", "b")])
    read, write = os.pipe()
    if os.fork() == 0:
        began = time.monotonic()
        try:
            scorer.score([("a", "b")])
            os.write(write, b"scored")
        except ForkedProcessError:
            os.write(write, f"{time.monotonic() - began:.5f}".encode())
        os._exit(0)
    os.close(write)
    print(os.read(read, 100).decode(), len(scorer.score([("a", "b")])))
"""


def interpreter_exit(bench: Bench) -> Outcome:
    """Check that the interpreter exits quickly while a hundred requests are queued."""
    ends = [_run_python(EXIT, bench.checkpoint) for _ in range(bench.count(5))]
    seconds = [ended_at - float(end.stdout or "nan") for end, ended_at in ends]
    statuses = {end.returncode for end, _ in ends}
    num_noisy = sum(end.stderr != "" for end, _ in ends)
    return Outcome(
        statuses == {0} and num_noisy == 0 and all(each <= MAX_EXIT_S for each in seconds),
        f"{len(ends)} exits: at most {max(seconds):.2f} s, exit codes {sorted(statuses)}, "
        f"{num_noisy} wrote to stderr",
    )


def fork_after_use(bench: Bench) -> Outcome:
    """Check that a forked child gets a typed error and that its parent can still score."""
    if not hasattr(os, "fork"):
        return Outcome(True, "this system has no fork")
    end, _ = _run_python(FORK, bench.checkpoint)
    child, _, parent = end.stdout.strip().partition(" ")
    is_right = bool(re.fullmatch(r"[\d.]+", child)) and float(child) <= 1 and parent == "1"
    return Outcome(
        is_right and end.returncode == 0,
        f"child: typed error after {child or 'no'} s; parent: {parent or 'no'} score",
    )


def _run_python(code: str, checkpoint: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a new interpreter. Return the completed process and the time when it ended."""
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )
    return completed, time.time()
