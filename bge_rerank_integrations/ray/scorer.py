"""`ServeScorer`: the scores of a Ray Serve application, through the methods of a `Scorer`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final, NamedTuple

from bge_rerank_integrations.batching.async_inputs import aread_pairs, aread_requests
from bge_rerank_integrations.batching.timeouts import next_item, start_countdown
from bge_rerank_integrations.divided_calls import (
    MAX_PAIRS,
    DividedCalls,
    Failure,
    Part,
    random_delay_s,
)
from bge_rerank_integrations.errors import (
    ConfigError,
    DeviceLostError,
    QueueFullError,
    RemoteError,
    RequestTimeoutError,
    RerankError,
    ServerUnreachableError,
    WorkerDiedError,
    missing_extra,
)

try:
    from ray.exceptions import RayActorError, RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.protocols import PackageScorer
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.runtime.steps import arun_steps, run_steps
from bge_rerank_integrations.validation import check_requests

# Another attempt can succeed after these errors: on another replica, or when the queue is shorter.
_RETRIED: Final = (DeviceLostError, QueueFullError, ServerUnreachableError, WorkerDiedError)
_TIMED_OUT: Final = "no replica answered within the timeout"


class _Call(NamedTuple):
    """A step: rank a part on a replica."""

    part: Part
    timeout_s: float | None


_Outcome = list[Ranking] | RerankError


class ServeScorer(PackageScorer):
    """Scores with a Ray Serve application that `app` built. It takes the place of a `Scorer` in the cluster.

    Arguments, results and errors are those of `Scorer`. Any number of threads and tasks can use one instance.
    Outside the cluster, use `RemoteScorer`.

    If a replica died, is shutting down or has a full queue, the call is retried after a random delay that
    grows with each attempt. There are at most `max_retries` retries, and none starts after the timeout of the
    call. Long lists take several calls, one after the other.

    Copying a scorer returns the scorer itself, and scorers can be pickled. Ray does not allow the synchronous
    methods in a thread with a running event loop; use the asynchronous ones there.

    Args:
        handle: A handle of the application.
        timeout: Maximum duration in seconds of each call to a replica, retries included. None means no
            limit.
        max_retries: Maximum number of retries of one call to a replica.
        normalize: Return scores from 0 to 1 instead of raw logits.

    Raises:
        ConfigError: A setting is invalid.

    Example:
        >>> scorer = ServeScorer(serve.get_app_handle("default"))
        >>> scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], top_n=1)
        [RankedPassage(index=1, score=..., truncated=False, windows=1, blank=False)]
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        timeout: float | None = 60.0,
        max_retries: int = 3,
        normalize: bool = False,
    ) -> None:
        if not isinstance(handle, DeploymentHandle):
            raise ConfigError(f"handle must be a DeploymentHandle, not {type(handle).__name__}")
        self._handle = handle
        self._calls: DividedCalls[_Call, _Outcome] = DividedCalls(
            _Call,
            _read,
            check_open=_never_closed,
            timeout=timeout,
            max_retries=max_retries,
            normalize=normalize,
            timed_out=_TIMED_OUT,
        )

    def score(self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None) -> list[float]:
        """Score (query, passage) pairs; see `Scorer.score`. An iterator is read while its pairs are scored.

        Args:
            pairs: (query, passage) pairs.
            timeout: Maximum duration of the whole call in seconds. With None, only each call to a
                replica has a limit.

        Returns:
            One float for each pair, in order.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which one.
            ServerUnreachableError: No replica answers.
            RequestTimeoutError: The call did not finish within its timeout.
            RerankError: For the same reasons as `Scorer.score`.
        """
        return run_steps(self._calls.score(pairs, start_countdown(timeout)), self._take)

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]],
        *,
        timeout: float | None = None,
    ) -> list[float]:
        """Do the same as `score` without blocking the event loop.

        An iterator is read in a separate thread, and an asynchronous iterator in the caller's task. Both are
        read while their pairs are scored.
        """
        remaining = start_countdown(timeout)
        if not isinstance(pairs, Iterator | AsyncIterable):
            return await arun_steps(self._calls.score(pairs, remaining), self._atake)
        scores: list[float] = []
        async with aclosing(aread_pairs(pairs, MAX_PAIRS)) as chunks:
            while (chunk := await next_item(chunks, remaining)) is not None:
                scores += await arun_steps(
                    self._calls.score_chunk(chunk, remaining, len(scores)), self._atake
                )
        return scores

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> Ranking:
        """Rank passages by their relevance to a query; see `Scorer.rank`.

        Args:
            query: The query.
            passages: The texts to rank.
            top_n: Maximum number of passages to return. None returns all, 0 returns none.
            threshold: Minimum score to return, inclusive. None returns every passage.
            timeout: Maximum duration of the whole call in seconds. With None, only each call to a
                replica has a limit.
            normalize: Whether to apply a sigmoid to the scores. None uses this scorer's setting.

        Returns:
            A list of `RankedPassage`, best first. Passages with equal logits stay in input order.

        Raises:
            InputError: An argument has the wrong type or is out of range; `.index` says which passage.
            RerankError: For the same reasons as `score`.
        """
        remaining = start_countdown(timeout)
        selection = self._calls.select(top_n, threshold, normalize)
        steps = self._calls.rank(query, passages, selection, remaining)
        return run_steps(steps, self._take)

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> Ranking:
        """Do the same as `rank` without blocking the event loop."""
        remaining = start_countdown(timeout)
        selection = self._calls.select(top_n, threshold, normalize)
        steps = self._calls.rank(query, passages, selection, remaining)
        return await arun_steps(steps, self._atake)

    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Rank the passages of several queries; see `Scorer.rank_many`.

        Args:
            requests: (query, passages) of each request.
            top_n: As in `rank`, for each request.
            threshold: As in `rank`, for each request.
            timeout: As in `rank`, for all requests together.
            normalize: As in `rank`.

        Returns:
            One ranking for each request, in order.

        Raises:
            InputError: For the same reasons as `rank`; `.index` says which request.
            RerankError: For the same reasons as `score`.
        """
        remaining = start_countdown(timeout)
        selection = self._calls.select(top_n, threshold, normalize)
        steps = self._calls.rank_many(check_requests(requests), selection, remaining)
        return run_steps(steps, self._take)

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do the same as `rank_many` without blocking the event loop.

        An iterator is read in a separate thread.
        """
        remaining = start_countdown(timeout)
        selection = self._calls.select(top_n, threshold, normalize)
        checked = await aread_requests(requests, remaining)
        steps = self._calls.rank_many(checked, selection, remaining)
        return await arun_steps(steps, self._atake)

    def __repr__(self) -> str:
        return f"ServeScorer(app={self._handle.app_name!r})"

    def _take(self, call: _Call) -> _Outcome:
        if asyncio._get_running_loop() is not None:  # Ray would raise its own error after it sent the call
            return RerankError(
                "Ray allows only asynchronous calls in a running event loop; use arank, arank_many or ascore"
            )
        try:
            response = self._send(call)
            try:
                rankings: list[Ranking] = response.result(timeout_s=call.timeout_s)
            except BaseException:
                # The caller was interrupted or the time is over, so nobody needs the result.
                response.cancel()
                raise
        except (RayError, RayServeException, TimeoutError) as error:
            return _error_of(error)
        return rankings

    async def _atake(self, call: _Call) -> _Outcome:
        try:
            response = self._send(call)
            try:
                rankings: list[Ranking] = await asyncio.wait_for(response, call.timeout_s)
            except BaseException:
                # The caller was cancelled or the time is over, so nobody needs the result.
                response.cancel()
                raise
        except (RayError, RayServeException, TimeoutError, asyncio.TimeoutError) as error:
            return _error_of(error)
        return rankings

    def _send(self, call: _Call) -> Any:
        requests, top_n, only_scores = call.part
        return self._handle.rank.remote(
            requests, top_n=top_n, only_scores=only_scores, timeout_s=call.timeout_s
        )


def _never_closed() -> None:
    """A handle cannot be closed."""


def _read(part: Part, outcome: _Outcome, attempt: int) -> list[Ranking] | Failure:  # noqa: ARG001
    if isinstance(outcome, list):
        return outcome
    return Failure(outcome, random_delay_s(attempt) if isinstance(outcome, _RETRIED) else None)


def _error_of(error: Exception) -> RerankError:
    """Return this package's error for an exception of Ray.

    The message of an exception that this package does not raise can contain anything, so only the name of its
    class is kept.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RerankError):
        return cause
    if isinstance(error, RayTaskError) and type(cause) is RayServeException:
        # The replica works, but it has no such method.
        return RemoteError(
            "the application does not rank; the handle must belong to an application that "
            "`bge_rerank_integrations.ray:app` has built"
        )
    if isinstance(cause, TimeoutError | asyncio.TimeoutError):
        return RequestTimeoutError(_TIMED_OUT)
    if isinstance(cause, BackPressureError):
        return QueueFullError("the application has too many requests")
    if isinstance(cause, DeploymentUnavailableError):
        return ServerUnreachableError(
            "the application has failed or was deleted; after `serve.shutdown()`, a new handle is needed"
        )
    if isinstance(cause, RayActorError | RayServeException):
        return ServerUnreachableError(f"the replica cannot be reached ({type(cause).__name__})")
    return RemoteError(f"the replica failed ({type(cause).__name__})")
