"""`ServeScorer`: the scores of a Ray Serve application, through the methods of a `Scorer`."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterable, Awaitable, Generator, Iterable, Iterator, Sequence
from itertools import count, groupby
from typing import Any, Final, NamedTuple, TypeVar

from bge_rerank_integrations.errors import (
    ConfigError,
    DeviceLostError,
    InputError,
    NonFiniteScoreError,
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
    from ray.serve.exceptions import BackPressureError, RayServeException
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.protocols import OwnScorer
from bge_rerank_integrations.ranking import Ranking, check_threshold, check_top_n
from bge_rerank_integrations.runtime.steps import arun_steps, run_steps
from bge_rerank_integrations.splitting import Fragment, error_of_call, merge_rankings, split_requests
from bge_rerank_integrations.validation import (
    acheck_stream,
    check_pairs,
    check_passages,
    check_query,
    check_requests,
    check_stream,
    check_timeout,
)

T = TypeVar("T")

# Limits of one call. A longer list takes several calls, one after the other.
_MAX_PAIRS: Final = 1024
_MAX_CHARACTERS: Final = 1_000_000
_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 8.0
# Another attempt can succeed after these errors: on another replica, or when the queue is shorter.
_RETRIED: Final = (DeviceLostError, QueueFullError, ServerUnreachableError, WorkerDiedError)


class _Call(NamedTuple):
    """A step: rank these requests on a replica."""

    requests: list[tuple[str, list[str]]]
    top_n: int | None
    only_scores: bool
    timeout_s: float | None


class _Sleep(NamedTuple):
    """A step: wait for a number of seconds."""

    seconds: float


class _Selection(NamedTuple):
    """The arguments of `rank` that select passages, with the scale decided."""

    top_n: int | None
    threshold: float | None
    normalize: bool


_Outcome = list[Ranking] | RerankError | None
# The steps of a call. The synchronous and the asynchronous methods take the same steps.
_Steps = Generator[_Call | _Sleep, _Outcome, T]


class ServeScorer(OwnScorer):
    """Scores with a Ray Serve application that `app` built. It takes the place of a `Scorer` in the cluster.

    Arguments, results and errors are those of `Scorer`. Any number of threads and tasks can use one instance.
    Outside the cluster, use `RemoteScorer`.

    A call that failed because a replica died, is shutting down or has a full queue is repeated after a
    growing, random delay, while the call's time is not over. Long lists take several calls, one after the
    other.

    Copies are the same object, and instances can be pickled. Ray does not allow the synchronous methods in a
    thread with a running event loop; use the asynchronous ones there.

    Args:
        handle: A handle of the application.
        timeout: Maximum duration in seconds of each call to a replica, including its repetitions. None is no
            limit.
        max_retries: Maximum number of repetitions of one call to a replica.
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
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and 0 < timeout < math.inf):
            raise ConfigError("timeout must be a positive number of seconds or None")
        if not isinstance(max_retries, int) or isinstance(max_retries, bool) or max_retries < 0:
            raise ConfigError("max_retries must be an integer of at least 0")
        if not isinstance(normalize, bool):
            raise ConfigError("normalize must be True or False")
        self._handle = handle
        self._timeout = timeout
        self._max_retries = max_retries
        self._normalize = normalize

    def score(self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None) -> list[float]:
        """Score (query, passage) pairs; see `Scorer.score`. An iterator is read while its pairs are scored.

        Args:
            pairs: (query, passage) pairs.
            timeout: Maximum duration of the whole call in seconds. None is no limit except that of each call
                to a replica.

        Returns:
            One float for each pair, in order.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which one.
            ServerUnreachableError: No replica answers.
            RequestTimeoutError: The call did not finish within its timeout.
            RerankError: For the same reasons as `Scorer.score`.
        """
        return run_steps(self._score(pairs, _deadline(timeout)), self._do)

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]],
        *,
        timeout: float | None = None,
    ) -> list[float]:
        """Do the same as `score` without blocking the event loop.

        An iterator is read in the caller's task, so one that blocks should be asynchronous.
        """
        deadline = _deadline(timeout)
        if not isinstance(pairs, AsyncIterable):
            return await arun_steps(self._score(pairs, deadline), self._ado)
        scores: list[float] = []
        async for chunk in acheck_stream(pairs, _MAX_PAIRS):
            scores += await arun_steps(self._score_chunk(chunk, deadline, len(scores)), self._ado)
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
            timeout: Maximum duration of the whole call in seconds. None is no limit except that of each call
                to a replica.
            normalize: Whether to apply a sigmoid to the scores. None uses this scorer's setting.

        Returns:
            A list of `RankedPassage`, best first. Passages with equal scores stay in input order.

        Raises:
            InputError: An argument has the wrong type or is out of range; `.index` says which passage.
            RerankError: For the same reasons as `score`.
        """
        return run_steps(self._rank(query, passages, top_n, threshold, timeout, normalize), self._do)

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
        steps = self._rank(query, passages, top_n, threshold, timeout, normalize)
        return await arun_steps(steps, self._ado)

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
        return run_steps(self._rank_many(requests, top_n, threshold, timeout, normalize), self._do)

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do the same as `rank_many` without blocking the event loop."""
        return await arun_steps(self._rank_many(requests, top_n, threshold, timeout, normalize), self._ado)

    def __repr__(self) -> str:
        return f"ServeScorer(app={self._handle.app_name!r})"

    def __copy__(self) -> ServeScorer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ServeScorer:
        return self

    def _score(self, pairs: Iterable[tuple[str, str]], deadline: float | None) -> _Steps[list[float]]:
        chunks: Iterable[list[tuple[str, str]]]
        # A list is checked before any of it is sent. An iterator can only be checked while it is read.
        chunks = check_stream(pairs, _MAX_PAIRS) if isinstance(pairs, Iterator) else [check_pairs(pairs)]
        scores: list[float] = []
        for chunk in chunks:
            scores += yield from self._score_chunk(chunk, deadline, len(scores))
        return scores

    def _score_chunk(
        self, pairs: list[tuple[str, str]], deadline: float | None, start: int
    ) -> _Steps[list[float]]:
        grouped = groupby(pairs, key=lambda pair: pair[0])
        requests = [(query, [passage for _, passage in group]) for query, group in grouped]
        selection = _Selection(None, None, self._normalize)
        rankings = yield from self._rank_checked(requests, selection, deadline, only_scores=True, start=start)
        in_order = [sorted(ranking, key=lambda passage: passage.index) for ranking in rankings]
        return [passage.score for ranking in in_order for passage in ranking]

    def _rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None,
        threshold: float | None,
        timeout: float | None,
        normalize: bool | None,
    ) -> _Steps[Ranking]:
        selection = self._selection(top_n, threshold, normalize)
        texts = check_passages(passages)
        requests = [(check_query(query), texts)]
        return (yield from self._rank_checked(requests, selection, _deadline(timeout)))[0]

    def _rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None,
        threshold: float | None,
        timeout: float | None,
        normalize: bool | None,
    ) -> _Steps[list[Ranking]]:
        selection = self._selection(top_n, threshold, normalize)
        checked = check_requests(requests)
        return (yield from self._rank_checked(checked, selection, _deadline(timeout), names_request=True))

    def _selection(self, top_n: int | None, threshold: float | None, normalize: bool | None) -> _Selection:
        check_top_n(top_n)
        scale = self._normalize if normalize is None else normalize
        check_threshold(threshold, normalize=scale)
        return _Selection(top_n, threshold, scale)

    def _rank_checked(
        self,
        requests: Sequence[tuple[str, list[str]]],
        selection: _Selection,
        deadline: float | None,
        *,
        only_scores: bool = False,
        start: int = 0,
        names_request: bool = False,
    ) -> _Steps[list[Ranking]]:
        """Rank requests in as many calls to replicas as it takes.

        Args:
            requests: (query, passages) of each request, checked.
            selection: Which passages to return, and on which scale.
            deadline: End of the call's time on the monotonic clock.
            only_scores: Score every pair as `score` does.
            start: Index of the first pair, for errors.
            names_request: Whether the index of an error is the position of the request. Otherwise it is that
                of the passage.
        """
        ranked: list[tuple[Fragment, Ranking]] = []
        for part in split_requests(requests, max_pairs=_MAX_PAIRS, max_characters=_MAX_CHARACTERS):
            call = _Call(
                [(fragment.query, fragment.passages) for fragment in part],
                selection.top_n,
                only_scores,
                None,
            )
            try:
                rankings = yield from self._repeat(call, deadline)
            except NonFiniteScoreError as error:
                index = start + (error.index or 0)
                raise NonFiniteScoreError(
                    f"the model's score of pair {index} is not finite", index=index
                ) from None
            except InputError as error:
                raise error_of_call(error, part, names_request=names_request) from None
            ranked.extend(zip(part, rankings, strict=True))
            start += sum(len(fragment.passages) for fragment in part)
        # Replicas return raw logits, because the order depends on them. The scale is applied here.
        return merge_rankings(
            len(requests),
            ranked,
            top_n=selection.top_n,
            threshold=selection.threshold,
            normalize=selection.normalize,
        )

    def _repeat(self, call: _Call, deadline: float | None) -> _Steps[list[Ranking]]:
        """Call a replica until one of them answers, the time is over or there were enough attempts."""
        own_deadline = _deadline(self._timeout)
        deadlines = [each for each in (deadline, own_deadline) if each is not None]
        for attempt in count():
            left_s = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
            if left_s == 0:
                raise RequestTimeoutError("no replica answered within the timeout")
            outcome = yield call._replace(timeout_s=left_s)
            if isinstance(outcome, list):
                return outcome
            assert outcome is not None, "a call has an outcome"
            delay_s = min(_FIRST_DELAY_S * 2.0**attempt, _MAX_DELAY_S) * random.uniform(0.5, 1.0)
            left_s = min(deadlines) - time.monotonic() if deadlines else math.inf
            is_final = not isinstance(outcome, _RETRIED) or attempt >= self._max_retries or delay_s >= left_s
            if is_final:
                raise outcome
            yield _Sleep(delay_s)
        raise AssertionError("unreachable")

    def _do(self, step: _Call | _Sleep) -> _Outcome:
        if isinstance(step, _Sleep):
            time.sleep(step.seconds)
            return None
        try:
            response = self._send(step)
            try:
                rankings: list[Ranking] = response.result(timeout_s=step.timeout_s)
            except TimeoutError:
                response.cancel()
                raise
        except (RayError, RayServeException, TimeoutError) as error:
            return _error_of(error)
        return rankings

    async def _ado(self, step: _Call | _Sleep) -> _Outcome:
        if isinstance(step, _Sleep):
            await asyncio.sleep(step.seconds)
            return None
        try:
            response = self._send(step)
            try:
                rankings: list[Ranking] = await asyncio.wait_for(_result(response), step.timeout_s)
            except BaseException:
                # The caller was cancelled or the time is over, so nobody needs the result.
                response.cancel()
                raise
        except (RayError, RayServeException, TimeoutError, asyncio.TimeoutError) as error:
            return _error_of(error)
        return rankings

    def _send(self, call: _Call) -> Any:
        return self._handle.rank.remote(
            call.requests, top_n=call.top_n, only_scores=call.only_scores, timeout_s=call.timeout_s
        )


async def _result(response: Awaitable[list[Ranking]]) -> list[Ranking]:
    return await response


def _error_of(error: Exception) -> RerankError:
    """Return this package's error for an exception of Ray.

    The message of an exception that this package does not raise can contain anything, so only the name of its
    class is kept.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RerankError):
        return cause
    if isinstance(cause, TimeoutError | asyncio.TimeoutError):
        return RequestTimeoutError("no replica answered within the timeout")
    if isinstance(cause, BackPressureError):
        return QueueFullError("the application has too many requests")
    if isinstance(cause, RayActorError | RayServeException):
        return ServerUnreachableError(f"the replica cannot be reached ({type(cause).__name__})")
    return RemoteError(f"the replica failed ({type(cause).__name__})")


def _deadline(timeout: float | None) -> float | None:
    check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout
