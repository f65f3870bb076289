"""A scorer that tests hold and release, and servers that run in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from bge_rerank_integrations import RankedPassage, Ranking, ScorerConfig
from bge_rerank_integrations.batching.stats import HealthState, ScorerHealth
from bge_rerank_integrations.errors import QueueFullError

PATIENCE_S = 20.0  # a hundred times as long as anything takes that does not hang


class HeldScorer:
    """Scores a passage with the number it begins with, as soon as it is released.

    Each word is a token. What is held counts as queued.
    """

    def __init__(self, *, is_held: bool = True, max_queued_tokens: int | None = None) -> None:
        self.config = ScorerConfig(
            model="some/folder/held", max_length=64, max_queued_tokens=max_queued_tokens
        )
        self.is_held = is_held
        self.state: HealthState = "ok"
        self.error: Exception | None = None
        self.queued_tokens = 0
        self.num_asked = self.num_calls = self.num_cancelled = 0
        self.sizes: list[int] = []

    async def arank_many(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[Ranking]:
        self.num_asked += 1
        requests = list(requests)
        passages = [passage for _, texts in requests for passage in texts]
        num_tokens = sum(len(passage.split()) for passage in passages)
        limit = self.config.max_queued_tokens
        if limit is not None and self.queued_tokens + num_tokens > limit:
            raise QueueFullError("full", never_fits=num_tokens > limit)
        self.num_calls += 1
        self.sizes.append(len(passages))
        self.queued_tokens += num_tokens
        try:
            while self.is_held:  # noqa: ASYNC110  # released from another thread
                await asyncio.sleep(0.002)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.queued_tokens -= num_tokens
        if self.error is not None:
            raise self.error
        return [_rank(texts) for _, texts in requests]

    async def arank(self, query: str, passages: Sequence[str]) -> Ranking:
        (ranking,) = await self.arank_many([(query, passages)])
        return ranking

    async def ascore(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        rankings = await self.arank_many([(query, [passage]) for query, passage in pairs])
        return [ranking[0].score for ranking in rankings]

    def health(self) -> ScorerHealth:
        return ScorerHealth(self.state, 0, self.queued_tokens, 1, 1)


def _rank(texts: Sequence[str]) -> Ranking:
    scored = [
        RankedPassage(index, _number(text), truncated="long" in text) for index, text in enumerate(texts)
    ]
    return Ranking(
        sorted(scored, key=lambda passage: -passage.score),
        num_pairs=len(texts),
        num_tokens=sum(len(text.split()) for text in texts),
        num_truncated=sum(passage.truncated for passage in scored),
    )


def _number(text: str) -> float:
    try:
        return max(min(float(text.split()[0]), 1e3), -1e3)
    except (IndexError, ValueError):
        return 0.0


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Run an application on a free port of the loopback interface, and give its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http="h11", log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
