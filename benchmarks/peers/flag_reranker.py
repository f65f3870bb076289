"""`FlagReranker` of FlagEmbedding."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.common import Pairs
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, batch_sizes, watch_module

_DEFAULT_BATCH_SIZE = 128


def load(kind: str, setup: Setup, _: ExitStack) -> Contender:
    """Load `FlagReranker` with its defaults, or with its fastest settings if `kind` is `best`."""
    from FlagEmbedding import FlagReranker

    best = kind == "best"
    # It does not support bfloat16, and always uses float32 on a CPU.
    half = best and setup.on_cuda
    reranker = FlagReranker(str(setup.plain), use_fp16=half, devices=[setup.device])

    def run(pairs: Pairs, batch_size: int | None) -> list[float]:
        return list(reranker.compute_score(pairs, batch_size=batch_size or _DEFAULT_BATCH_SIZE))

    return Contender(
        name="FlagReranker, best" if best else "FlagReranker",
        dtype="float16" if half else "float32",
        run=run,
        watch=watch_module(reranker.model),
        batch_sizes=batch_sizes(setup) if best else (),
        batch_size=_DEFAULT_BATCH_SIZE,
    )
