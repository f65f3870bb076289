"""oneDNN must not compile and keep a new kernel for every new length of a request."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch

from bge_rerank_integrations.engine.linear import onednn_linear, resolve_linear

# Batches of every number of tokens from about 30 to 1,500, in the forward pass on one thread and on two.
SCORE_EVERY_LENGTH = """
    import random, sys
    from bge_rerank_integrations import Scorer

    with Scorer(sys.argv[1], device="cpu", dtype=sys.argv[2], num_threads=2, max_length=512) as scorer:
        rng = random.Random(0)
        for _ in range(400):
            pairs = [("one", "two " * rng.randrange(1, 350)) for _ in range(rng.randrange(1, 6))]
            scorer.score(pairs)
"""
# Linear layers see eight sizes between two powers of two. Attention sees as many lengths, times a few powers of two.
MOST_KERNELS = {"float32": 250, "bfloat16": 550}


@pytest.mark.parametrize("dtype", sorted(MOST_KERNELS))
def test_few_onednn_kernels_serve_all_lengths(checkpoint: Path, dtype: str) -> None:
    if resolve_linear(torch.device("cpu"), getattr(torch, dtype), 2) is not onednn_linear:
        pytest.skip(f"oneDNN does not multiply {dtype} on this machine")
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCORE_EVERY_LENGTH), str(checkpoint), dtype],
        env={**os.environ, "ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    made = Counter(line.split(",")[5] for line in child.stdout.splitlines() if "create:cache_miss" in line)
    assert made.total() > 20, "the test parses the log of oneDNN"
    assert made.total() <= MOST_KERNELS[dtype], made
