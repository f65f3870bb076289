"""Sequences of random ids, logits of the plain model, and a forward pass with limited memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.workers import Replica
from bge_rerank_integrations.engine.runner import Runner
from tests.support.queues import submit

IntArray = npt.NDArray[np.int32]
CPU = torch.device("cpu")


def random_ids(lengths: list[int], vocab_size: int, seed: int = 0) -> list[IntArray]:
    """Return sequences of random ids between `<s>` and `</s>`, without special tokens inside."""
    random = np.random.default_rng(seed)
    sequences = [random.integers(5, vocab_size, length, dtype=np.int32) for length in lengths]
    for sequence in sequences:
        sequence[0], sequence[-1] = 0, 2
    return sequences


def replica_of(runner: Runner) -> Replica:
    return Replica(runner.launch, lambda: runner.max_batch_tokens, runner.depth)


def score_all(
    runner: Runner, sequences: list[IntArray], on_progress: Callable[[int], object] | None = None
) -> list[float]:
    """Return the logit of each sequence. The queue makes the batches, as in a scorer."""
    batcher = MicroBatcher([replica_of(runner)])
    logits = submit(batcher, sequences, on_progress)
    batcher.close()
    return logits.result(0)


def plain_logits(model: Any, sequences: list[IntArray]) -> list[float]:
    """Return the logit of each sequence, scored by itself so that nothing is padded."""
    with torch.inference_mode():
        return [
            model(torch.from_numpy(sequence)[None].long().to(model.device)).logits.float().item()
            for sequence in sequences
        ]


def max_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest absolute difference, and print it with the mean difference and the spread."""
    differences = np.abs(np.array(ours) - np.array(theirs))
    print(f"max {differences.max():.2e}, mean {differences.mean():.2e}, spread {np.std(theirs):.2f}")
    return float(differences.max())


class LimitedMemory:
    """A forward pass that returns the first id of each sequence, and fails for batches of too many tokens."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tried: list[int] = []

    def __call__(self, batch: Any) -> Tensor:
        self.tried.append(len(batch.ids))
        if len(batch.ids) > self.max_tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return batch.ids[batch.seqlens.cu_seqlens[:-1]].float()  # type: ignore[no-any-return]


def numbered(lengths: list[int]) -> list[IntArray]:
    """Return sequences that repeat their own index."""
    return [np.full(length, number, dtype=np.int32) for number, length in enumerate(lengths)]
