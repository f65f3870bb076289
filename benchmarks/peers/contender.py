"""What the benchmarks ask of a contender."""

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
"""Token ids [pairs, tokens], padding included."""

Watch = Callable[[Callable[[IdBatch], None]], AbstractContextManager[None]]
"""Shows each batch of ids that reaches the model to a function, while the context lasts."""

BATCH_SIZES: Final = {"cpu": (1, 8, 32), "cuda": (1, 32, 128)}


class NotAvailableError(Exception):
    """A contender that cannot run here; the message says why."""


@dataclass(kw_only=True)
class Contender:
    """One way to score pairs.

    Attributes:
        name: The package and the call.
        dtype: Its precision.
        run: Pairs and a batch size to a number each, in order: the raw logit, unless `gives_order`.
        watch: Shows what reaches its model; None for this package, which pads nothing.
        batch_sizes: To choose from; empty where it decides itself.
        batch_size: What was chosen, or its own default; None where it has none.
        gives_order: Its numbers are the places it gave the passages of a query, best first, negated.
    """

    name: str
    dtype: str
    run: Callable[[Pairs, int | None], Sequence[float]]
    watch: Watch | None = None
    batch_sizes: tuple[int, ...] = ()
    batch_size: int | None = None
    gives_order: bool = False

    def score(self, pairs: Pairs) -> list[float]:
        """Score pairs at the chosen batch size."""
        return list(map(float, self.run(pairs, self.batch_size)))


def batch_sizes(setup: Setup) -> tuple[int, ...]:
    """Return the batch sizes that peers may choose from on a device."""
    return BATCH_SIZES["cuda" if setup.on_cuda else "cpu"]


def watch_module(module: Any) -> Watch:
    """Watch what a transformers model embeds."""

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
    """Score pairs in the order of their characters, so that a batch has little padding."""
    order = sorted(range(len(pairs)), key=lambda row: -len(pairs[row][0]) - len(pairs[row][1]))
    scores = [0.0] * len(pairs)
    for row, value in zip(order, score([pairs[row] for row in order]), strict=True):
        scores[row] = value
    return scores


def scored_by_query(pairs: Pairs, rank: Callable[[str, list[str]], Sequence[int]]) -> list[float]:
    """Rank the passages of each query, as frameworks do, and return each pair's place, negated.

    Args:
        pairs: Those of one query are neighbours.
        rank: A query and its passages to their indices, best first.
    """
    places: list[float] = []
    for query, group in groupby(pairs, key=lambda pair: pair[0]):
        passages = [passage for _, passage in group]
        order = rank(query, passages)
        own = np.empty(len(passages))
        own[list(order)] = -np.arange(len(passages))
        places += own.tolist()
    return places
