"""`RemoteScorer`: the methods of `Scorer`, with scores from a server that `bge-rerank serve` runs."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from bge_rerank_integrations.api_key import API_KEY_VARIABLE
from bge_rerank_integrations.batching.async_inputs import aread_pairs, aread_requests
from bge_rerank_integrations.batching.timeouts import next_item, start_countdown
from bge_rerank_integrations.divided_calls import MAX_PAIRS, DividedCalls, Failure, Part
from bge_rerank_integrations.errors import ConfigError, ScorerClosedError
from bge_rerank_integrations.protocols import PackageScorer
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.remote_transport import Outcome, Send, Transport
from bge_rerank_integrations.remote_wire import (
    Answer,
    ApiKey,
    SupportsSecretValue,
    check_base_url,
    error_of,
    parse_rankings,
    retry_delay,
)
from bge_rerank_integrations.validation import check_requests

if TYPE_CHECKING:
    import httpx

_PATH: Final = "/v1/rank"


class RemoteScorer(PackageScorer):
    """Scores pairs on a server that `bge-rerank serve` runs. The adapters take it in place of a `Scorer`.

    `rank`, `rank_many`, `score` and their asynchronous forms have the arguments, results and errors of those
    of `Scorer`, but no `progress`. Any number of threads and asyncio tasks can use one instance. It has one
    pool of connections for sync calls, and one for each event loop.

    An HTTP request is retried if the connection fails, if the status is 429, 502 or 503, or if a proxy
    answers with status 500 or 504. A timeout is not retried. The delay before the next attempt is the one in
    the header `Retry-After`, or a random delay that grows with each attempt. There are at most `max_retries`
    retries, and none starts after the request's `timeout` or the timeout of the call. A long list of passages
    is sent in several HTTP requests, one after the other.

    Copying a scorer returns the scorer itself. A pickle contains the settings but not the API key. The
    unpickled scorer reads the key from the environment.

    Args:
        base_url: Address of the server, such as `https://host:8000`. It may contain a path, for a server
            behind a proxy.
        api_key: The API key of the server, as a string or a `SecretStr`. None uses the environment variable
            `BGE_RERANK_API_KEY`, if it is set.
        timeout: Maximum duration of each HTTP request in seconds, retries included. None means no limit. A
            sync call exceeds it while the server sends response headers in small pieces, or one interim
            response (status 100 to 199) after the other.
        max_retries: Maximum number of retries of one HTTP request.
        normalize: Whether to apply a sigmoid to the scores. The default is False, as in `Scorer`.
        client: An `httpx.Client` for the sync methods. `close` does not close it. None creates a client at
            first use.
        async_client: The same for the async methods.

    Raises:
        ConfigError: A setting is invalid.

    Example:
        >>> with RemoteScorer("http://127.0.0.1:8000") as scorer:
        ...     scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], top_n=1)
        [RankedPassage(index=1, score=..., truncated=False, windows=1, blank=False)]
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | SupportsSecretValue | None = None,
        timeout: float | None = 60.0,
        max_retries: int = 3,
        normalize: bool = False,
        client: httpx.Client | None = None,
        async_client: httpx.AsyncClient | None = None,
    ) -> None:
        self._base_url = check_base_url(base_url)
        self._given_url = base_url
        self._key = ApiKey((os.environ.get(API_KEY_VARIABLE) or None) if api_key is None else api_key)
        self._timeout = timeout
        self._max_retries = max_retries
        self._normalize = normalize
        self._transport = Transport(self._base_url + _PATH, self._key, client, async_client)
        self._is_closed = False
        self._calls: DividedCalls[Send, Outcome] = DividedCalls(
            _send,
            _read,
            check_open=self._check_open,
            timeout=timeout,
            max_retries=max_retries,
            normalize=normalize,
            timed_out="the server did not answer within the timeout",
        )

    def score(self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None) -> list[float]:
        """Score (query, passage) pairs, as `Scorer.score` does.

        An iterator is read while its pairs are scored.

        Args:
            pairs: (query, passage) pairs.
            timeout: Maximum duration of the whole call in seconds. With None, only each HTTP request has a
                limit.

        Returns:
            One float for each pair, in order.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which one.
            AuthenticationError: The server does not accept the API key.
            ServerUnreachableError: The server does not answer, or it accepts no requests at the moment.
            RequestTimeoutError: The call, or an HTTP request, did not finish within its timeout.
            RerankError: For the same reasons as `Scorer.score`.

        Example:
            >>> scores = scorer.score([("what is a panda?", "The giant panda is a bear."), ("hi", "bye")])
        """
        return self._transport.run(self._calls.score(pairs, start_countdown(timeout)))

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
            return await self._transport.arun(self._calls.score(pairs, remaining))
        scores: list[float] = []
        async with aclosing(aread_pairs(pairs, MAX_PAIRS)) as chunks:
            while (chunk := await next_item(chunks, remaining)) is not None:
                scores += await self._transport.arun(self._calls.score_chunk(chunk, remaining, len(scores)))
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
        """Rank passages by their relevance to a query, as `Scorer.rank` does.

        Args:
            query: The query.
            passages: The texts to rank.
            top_n: Maximum number of passages to return. None returns all, 0 returns none.
            threshold: Minimum score to return, inclusive. None returns every passage.
            timeout: As in `score`.
            normalize: Whether to apply a sigmoid to the scores. None uses the setting of this scorer.

        Returns:
            A list of `RankedPassage`, best first. Passages with equal logits stay in input order.

        Raises:
            InputError: An argument has the wrong type or is out of range, or the server refuses a passage;
                `.index` says which passage.
            RerankError: For the same reasons as `score`.

        Example:
            >>> scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."])[0].index
            1
        """
        remaining = start_countdown(timeout)
        selection = self._calls.select(top_n, threshold, normalize)
        steps = self._calls.rank(query, passages, selection, remaining)
        return self._transport.run(steps)

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
        return await self._transport.arun(steps)

    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Rank the passages of several queries, as `Scorer.rank_many` does.

        Args:
            requests: (query, passages) of each request.
            top_n: As in `rank`, for each request.
            threshold: As in `rank`, for each request.
            timeout: As in `score`, for all requests together.
            normalize: As in `rank`.

        Returns:
            One ranking for each request, in order.

        Raises:
            InputError: For the same reasons as `rank`; `.index` says which request.
            RerankError: For the same reasons as `score`.

        Example:
            >>> rankings = scorer.rank_many([("panda", ["a bear", "tea"]), ("tea", ["a cup of tea"])])
        """
        remaining = start_countdown(timeout)
        selection = self._calls.select(top_n, threshold, normalize)
        steps = self._calls.rank_many(check_requests(requests), selection, remaining)
        return self._transport.run(steps)

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
        return await self._transport.arun(steps)

    def to_dict(self) -> dict[str, str | float | bool | None]:
        """Return the settings, without the API key, as a JSON-serializable dict for `from_dict`."""
        return {
            "base_url": self._given_url,
            "timeout": self._timeout,
            "max_retries": self._max_retries,
            "normalize": self._normalize,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RemoteScorer:
        """Create a scorer from the result of `to_dict`. It reads the API key from the environment.

        Raises:
            ConfigError: A setting is unknown, missing or invalid.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"the settings must be a mapping, not {type(data).__name__}")
        known = {"base_url", "timeout", "max_retries", "normalize"}
        unknown = sorted(set(data) - known, key=str)
        if unknown or "base_url" not in data:
            raise ConfigError(
                f"base_url is required, and the known settings are {sorted(known)}; unknown settings: "
                f"{unknown}"
            )
        return cls(**data)

    def close(self) -> None:
        """Reject new calls and close the connections of sync calls. It is safe to call this twice.

        An HTTP request that another thread is sending is finished first, but it is not retried. Connections
        of async calls belong to their event loop. `aclose` closes them.
        """
        self._is_closed = True
        self._transport.close()

    async def aclose(self) -> None:
        """Do the same as `close`, and close the connections of the running event loop."""
        self.close()
        await self._transport.aclose()

    def __enter__(self) -> RemoteScorer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> RemoteScorer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"RemoteScorer({self._base_url!r})"

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Any]], RemoteScorer], tuple[dict[str, Any]]]:
        if self._transport.has_given_client:
            raise ConfigError("a RemoteScorer that was created with a client cannot be pickled")
        return RemoteScorer.from_dict, (self.to_dict(),)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ScorerClosedError


def _send(part: Part, timeout_s: float | None) -> Send:
    content = json.dumps({**part._asdict(), "timeout_s": timeout_s}, ensure_ascii=False)
    # A lone surrogate is sent unchanged. The server treats it like a local scorer does.
    return Send(content.encode("utf-8", "surrogatepass"), timeout_s)


def _read(part: Part, outcome: Outcome, attempt: int) -> list[Ranking] | Failure:
    if isinstance(outcome, Answer) and outcome.status == 200:
        return parse_rankings(outcome.content, part)
    error = error_of(outcome)
    if isinstance(outcome, Exception):
        error.__cause__ = outcome
    return Failure(error, retry_delay(outcome, error, attempt))
