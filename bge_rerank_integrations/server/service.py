"""Accepts work, splits it into parts, ranks it and drains it at shutdown. It is independent of HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from bge_rerank_integrations.config import NUM_SPECIAL_TOKENS
from bge_rerank_integrations.errors import InputError, NonFiniteScoreError, QueueFullError
from bge_rerank_integrations.ranking import RankedPassage, Ranking, Selection
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.server.dialects.dialect import Work
from bge_rerank_integrations.server.refusal import Refusal
from bge_rerank_integrations.splitting import (
    Fragment,
    error_of_call,
    merge_rankings,
    score_error_of_call,
    split_requests,
)

# One thread encodes a part. Parts are small, so that a long request does not block the tokenizer for others.
# Two parts of a request are processed at once, so that the device has work while the next part is encoded.
_MAX_PAIRS: Final = 512
_MAX_CHARACTERS: Final = 4_000_000
_NUM_PARTS_AT_ONCE: Final = 2
# A part takes at most this share of the queue. It then fits as soon as other requests have ended.
_MAX_QUEUE_SHARE: Final = 0.5
_RETRY_S: Final = 0.01

T = TypeVar("T")
_Part = list[Fragment]
_Run = Callable[[Scorer, _Part], Awaitable[list[Ranking]]]


class Service:
    """Ranks work with one scorer. Any number of tasks of one event loop can use it.

    Args:
        scorer: A scorer with `normalize=False`, or the future of a scorer that is being loaded.

    Example:
        >>> service = Service(scorer)
        >>> await service.rank(Work(requests=[("what is a panda?", ["A bear."])]))
        [[RankedPassage(index=0, score=..., truncated=False, windows=1, blank=False)]]
    """

    def __init__(self, scorer: Scorer | Future[Scorer]) -> None:
        self._loading: Future[Scorer] = scorer if isinstance(scorer, Future) else _done(scorer)
        self._is_draining = False
        self._receiving: set[asyncio.Task[bytes]] = set()
        self._accepted: set[asyncio.Task[list[Ranking]]] = set()
        self._num_running = 0  # parts
        self._part_ended = asyncio.Event()  # replaced when there may be room for the parts that wait

    @property
    def scorer(self) -> Scorer | None:
        """The scorer. It is None while the model is being loaded, and if loading has failed."""
        is_loaded = self._loading.done() and not self._loading.cancelled() and not self._loading.exception()
        return self._loading.result() if is_loaded else None

    @property
    def is_live(self) -> bool:
        """Whether this process can rank requests now, or when the model is loaded."""
        if not self._loading.done():
            return True
        scorer = self.scorer
        return scorer is not None and scorer.health().state != "device lost"

    @property
    def is_ready(self) -> bool:
        """Whether work is accepted now."""
        scorer = self.scorer
        return scorer is not None and not self._is_draining and scorer.health().ok

    def require_scorer(self) -> Scorer:
        """Return the scorer.

        Raises:
            Refusal: The model is being loaded or could not be loaded, or the server is shutting down.
        """
        if self._is_draining:
            raise Refusal(503, "the server is shutting down", "ServerDraining", retry_after_s=1)
        scorer = self.scorer
        if scorer is None:
            state = "could not be loaded" if self._loading.done() else "is still being loaded"
            raise Refusal(503, f"the model {state}", "ModelNotLoaded", retry_after_s=5)
        return scorer

    async def rank(self, work: Work) -> list[Ranking]:
        """Return one ranking for each request of the work. Cancelling drops sequences that have not started.

        Raises:
            QueueFullError: The first part of the work does not fit into the queue.
            Refusal: For the same reasons as `require_scorer`. Or the work can never fit into the queue. Or a
                text is too long and the work forbids truncation.
            RerankError: For the same reasons as `Scorer.rank`.
        """
        scorer = self.require_scorer()
        message = "the server shut down before it was finished"
        return await _run_in(self._accepted, self._rank(scorer, work), message)

    async def receive(self, body: Coroutine[Any, Any, bytes]) -> bytes:
        """Return the body of a request that is being received.

        Raises:
            Refusal: The server is shutting down. It does not wait for the rest of the body.
        """
        try:
            self.require_scorer()  # since the request was accepted, other tasks may have run
        except Refusal:
            body.close()
            raise
        return await _run_in(self._receiving, body, "the server is shutting down")

    def begin_drain(self) -> None:
        """Stop accepting new work."""
        self._is_draining = True
        for task in self._receiving:
            task.cancel()

    async def drain(self, grace_s: float) -> int:
        """Wait until the accepted work is finished. After `grace_s` seconds, cancel the unfinished requests.

        Returns:
            The number of cancelled requests.
        """
        self.begin_drain()
        if not self._accepted:
            return 0
        _, unfinished = await asyncio.wait(self._accepted, timeout=grace_s)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
        return len(unfinished)

    async def _rank(self, scorer: Scorer, work: Work) -> list[Ranking]:
        rankings = merge_rankings(
            len(work.requests),
            await self._run_all(_score_all if work.only_scores else _rank_all, scorer, work.requests),
            Selection(work.top_n, None, normalize=not work.raw_scores),
        )
        num_truncated = sum(ranking.num_truncated + ranking.num_truncated_queries for ranking in rankings)
        if work.refuse_truncated and num_truncated:
            raise Refusal(
                400,
                f"{num_truncated} text(s) do not fit into {scorer.config.max_length} tokens with the "
                "query, and the request forbids truncation",
                "InputTooLong",
            )
        return rankings

    async def _run_all(
        self, run: _Run, scorer: Scorer, requests: Sequence[tuple[str, Sequence[str]]]
    ) -> list[tuple[Fragment, Ranking]]:
        """Rank requests in parts, a few at a time, and return the ranking of each fragment."""
        running: deque[tuple[_Part, int, asyncio.Task[list[Ranking]]]] = deque()
        ranked: list[tuple[Fragment, Ranking]] = []
        num_pairs = 0

        async def finish_oldest() -> None:
            part, start, task = running[0]
            try:
                rankings = await task
            except NonFiniteScoreError as error:
                raise score_error_of_call(error, start) from None
            except InputError as error:
                raise error_of_call(error, part, names_request=len(requests) > 1) from None
            running.popleft()
            ranked.extend(zip(part, rankings, strict=True))

        try:
            for part in _parts(scorer, requests):
                # Only the first part may be refused with 429. The second part starts when the first one has
                # ended, so that it cannot take the first part's space.
                may_wait = num_pairs > 0
                if running and (not ranked or len(running) == _NUM_PARTS_AT_ONCE):
                    await finish_oldest()
                task = asyncio.ensure_future(self._run_part(run, scorer, part, may_wait=may_wait))
                running.append((part, num_pairs, task))
                num_pairs += sum(len(fragment.passages) for fragment in part)
            while running:
                await finish_oldest()
        finally:
            for _, _, task in running:
                task.cancel()
            if running:
                await asyncio.wait({task for _, _, task in running})
        return ranked

    async def _run_part(self, run: _Run, scorer: Scorer, part: _Part, *, may_wait: bool) -> list[Ranking]:
        """Rank one part. If `may_wait` is set, wait for space in the queue instead of raising."""
        while True:
            self._num_running += 1
            is_refused = False
            try:
                _check_room(scorer, part)
                return await run(scorer, part)
            except QueueFullError as error:
                is_refused = True
                if error.never_fits:
                    raise Refusal(
                        413, f"a document is too long for the queue: {error}", "InputTooLong"
                    ) from None
                if not may_wait:
                    raise
            finally:
                self._num_running -= 1
                # A refused part leaves no room. If it woke up the parts that wait, they would try in vain and
                # wake up each other, again and again. But they must not wait if no part is running.
                if not (is_refused and self._num_running):
                    self._part_ended.set()
                    self._part_ended = asyncio.Event()
            if self._num_running:
                await self._part_ended.wait()
            else:  # other users of the scorer fill the queue, and nothing tells when it has room again
                await asyncio.sleep(_RETRY_S)


async def _run_in(tasks: set[asyncio.Task[T]], coroutine: Coroutine[Any, Any, T], message: str) -> T:
    """Run a coroutine as one of the given tasks. If the drain cancels it, raise `Refusal` with a message."""
    task = asyncio.ensure_future(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()  # does nothing to a task that has ended
    if task.cancelled():
        raise Refusal(503, message, "ServerDraining", retry_after_s=1)
    return task.result()


async def _rank_all(scorer: Scorer, part: _Part) -> list[Ranking]:
    if len(part) == 1:  # errors of `arank` name the passage and not the request
        return [await scorer.arank(part[0].query, part[0].passages)]
    return await scorer.arank_many([(fragment.query, fragment.passages) for fragment in part])


async def _score_all(scorer: Scorer, part: _Part) -> list[Ranking]:
    scores = iter(
        await scorer.ascore([(fragment.query, passage) for fragment in part for passage in fragment.passages])
    )
    return [
        Ranking([RankedPassage(index, next(scores)) for index in range(len(fragment.passages))])
        for fragment in part
    ]


def _parts(scorer: Scorer, requests: Sequence[tuple[str, Sequence[str]]]) -> Iterable[_Part]:
    limit = scorer.config.max_queued_tokens
    max_pairs = _MAX_PAIRS
    if limit is not None:
        max_pairs = max(min(max_pairs, int(limit * _MAX_QUEUE_SHARE) // scorer.config.max_length), 1)
    return split_requests(requests, max_pairs=max_pairs, max_characters=_MAX_CHARACTERS)


def _check_room(scorer: Scorer, part: _Part) -> None:
    """Raise if a part cannot fit into the queue, before the work of encoding it.

    A word has at least one token. The number of words is therefore a lower bound of the number of tokens.

    Raises:
        QueueFullError: The part does not fit.
    """
    limit = scorer.config.max_queued_tokens
    if limit is None:
        return
    queued = scorer.health().queued_tokens
    if queued == 0:
        return
    # The space for a passage beside the longest query.
    room = scorer.config.max_length - scorer.config.effective_query_max_length - NUM_SPECIAL_TOKENS
    needed = queued
    for fragment in part:
        for passage in set(fragment.passages):
            needed += NUM_SPECIAL_TOKENS + min(len(passage.split(None, room)), room)
            if needed > limit:
                raise QueueFullError(f"{queued} tokens are waiting; max_queued_tokens is {limit}")


def _done(scorer: Scorer) -> Future[Scorer]:
    future: Future[Scorer] = Future()
    future.set_result(scorer)
    return future
