"""A process with a model keeps the memory that one layer freed for the next."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Each round allocates and frees more than glibc keeps by default: twice the largest block that was freed.
ROUNDS = """
import resource, sys
import torch
from bge_rerank_integrations import Scorer

with Scorer(sys.argv[1], device="cpu", dtype="bfloat16") as scorer:
    scorer.warmup()

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(4 << 20, dtype=torch.uint8).fill_(1) for _ in range(6)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*[page_faults() for _ in range(10)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept(checkpoint: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ROUNDS, str(checkpoint)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    first, *later = map(int, run.stdout.split())
    assert first > 1000
    assert sum(later) < first
