"""The interface of a contender."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import Pairs
from benchmarks.models import Setup

IdBatch = npt.NDArray[Any]
"""Token ids [pairs, tokens], including padding."""

Watch = Callable[[Callable[[IdBatch], None]], AbstractContextManager[None]]
"""Returns a context in which a function is called with each batch of ids that reaches the model."""

BATCH_SIZES: Final = {"cpu": (1, 8, 32), "cuda": (1, 32, 128)}


class NotAvailableError(Exception):
    """A contender cannot run on this machine. The message says why."""


@dataclass(kw_only=True)
class Contender:
    """One way to score pairs.

    Attributes:
        name: Name of the package or call.
        dtype: Precision.
        run: Takes pairs and a batch size, and returns one number per pair, in order: the raw logit, or a
            negated rank if `gives_order`.
        watch: Records the ids that reach the model. None for this package, which pads nothing.
        batch_sizes: Batch sizes to choose from. Empty if the contender chooses the size itself.
        batch_size: The chosen batch size or the contender's default. None if it has no batch size.
        gives_order: Whether `run` returns the negated rank of each passage among those of its query, because
            the contender only returns an order.
    """

    name: str
    dtype: str
    run: Callable[[Pairs, int | None], Sequence[float]]
    watch: Watch | None = None
    batch_sizes: tuple[int, ...] = ()
    batch_size: int | None = None
    gives_order: bool = False

    def score(self, pairs: Pairs) -> list[float]:
        """Score pairs with the chosen batch size."""
        return list(map(float, self.run(pairs, self.batch_size)))


def batch_sizes(setup: Setup) -> tuple[int, ...]:
    """Return the batch sizes that peers can choose from on the setup's device."""
    return BATCH_SIZES["cuda" if setup.on_cuda else "cpu"]


def watch_module(module: Any) -> Watch:
    """Return a `Watch` for the ids that a transformers model embeds."""

    @contextmanager
    def watch(record: Callable[[IdBatch], None]) -> Iterator[None]:
        def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            record(inputs[0].cpu().numpy())

        handle = module.get_input_embeddings().register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    return watch


def longest_first(pairs: Pairs, score: Callable[[Pairs], Sequence[float]]) -> list[float]:
    """Score pairs in order of decreasing number of characters, so that batches have little padding."""
    order = sorted(range(len(pairs)), key=lambda row: -len(pairs[row][0]) - len(pairs[row][1]))
    scores = [0.0] * len(pairs)
    for row, value in zip(order, score([pairs[row] for row in order]), strict=True):
        scores[row] = value
    return scores


def scored_by_query(pairs: Pairs, rank: Callable[[str, list[str]], Sequence[int]]) -> list[float]:
    """Rank the passages of each query, as frameworks do, and return the negated rank of each pair.

    Args:
        pairs: The pairs, grouped by query.
        rank: Takes a query and its passages, and returns the passages' indices, best first.
    """
    places: list[float] = []
    for query, group in groupby(pairs, key=lambda pair: pair[0]):
        passages = [passage for _, passage in group]
        order = rank(query, passages)
        own = np.empty(len(passages))
        own[list(order)] = -np.arange(len(passages))
        places += own.tolist()
    return places
