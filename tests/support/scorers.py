"""Scorers for tests of the adapters, and the passages that they know."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from bge_rerank_integrations import RankedPassage

PANDA, BEAR, TEA = "TEXT-CANARY pandas eat bamboo", "TEXT-CANARY bears eat fish", "TEXT-CANARY tea is hot"
SCORES = {PANDA: 0.9, BEAR: 0.5, TEA: 0.1}
BEST_FIRST = [PANDA, BEAR, TEA]


class TableScorer:
    """Scores passages from a table, with 0.0 for unknown passages, and records its calls."""

    def __init__(self, scores: Mapping[str, float] = SCORES) -> None:
        self.scores = scores
        self.asked: list[tuple[str, list[str]]] = []

    def rank(
        self, query: str, passages: Sequence[str], top_n: int | None = None, threshold: float | None = None
    ) -> list[RankedPassage]:
        self.asked.append((query, list(passages)))
        scored = [RankedPassage(index, self.scores.get(text, 0.0)) for index, text in enumerate(passages)]
        kept = [passage for passage in scored if threshold is None or passage.score >= threshold]
        return sorted(kept, key=lambda passage: -passage.score)[:top_n]

    async def arank(
        self, query: str, passages: Sequence[str], top_n: int | None = None, threshold: float | None = None
    ) -> list[RankedPassage]:
        return self.rank(query, passages, top_n, threshold)


class BrokenScorer(TableScorer):
    """Raises an error in every call."""

    def rank(self, *args: Any, **kwargs: Any) -> list[RankedPassage]:
        raise RuntimeError("the device is on fire")


class StuckScorer(TableScorer):
    """Signals when an async call has begun, and never finishes it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()

    async def arank(self, *args: Any, **kwargs: Any) -> list[RankedPassage]:
        self.begun.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")
