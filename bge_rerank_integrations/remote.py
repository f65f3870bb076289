"""`RemoteScorer`: the scores of a `bge-rerank serve` process, through the methods of a `Scorer`."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
import weakref
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from itertools import count, groupby
from typing import Any, Final, NamedTuple, TypeVar

from bge_rerank_integrations.errors import (
    ConfigError,
    NonFiniteScoreError,
    RequestTimeoutError,
    ScorerClosedError,
    missing_extra,
)

try:
    import httpx
except ImportError as error:
    raise missing_extra("remote", "httpx") from error

from bge_rerank_integrations.ranking import Ranking, check_threshold, check_top_n
from bge_rerank_integrations.remote_wire import (
    Answer,
    ApiKey,
    SupportsSecretValue,
    check_base_url,
    error_of,
    parse_rankings,
    raise_unusable,
    retry_delay,
)
from bge_rerank_integrations.scorer import OwnScorer
from bge_rerank_integrations.splitting import Fragment, merge_rankings, split_requests
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

_API_KEY_VARIABLE: Final = "BGE_RERANK_API_KEY"
_PATH: Final = "/v1/rank"

# Limits of one HTTP request; a longer list of pairs takes several, one after the other.
_MAX_PAIRS: Final = 1024
_MAX_CHARACTERS: Final = 1_000_000


class _Send(NamedTuple):
    """A step: post this content, and give the response or the error of the transport."""

    content: bytes
    timeout_s: float | None


class _Sleep(NamedTuple):
    """A step: wait so many seconds."""

    seconds: float


class _Cut(NamedTuple):
    """What to keep of a ranking: arguments of `rank`, with the scale decided."""

    top_n: int | None
    threshold: float | None
    normalize: bool


# What a call does, step by step; the same steps are taken with a sync and with an async client.
_Steps = Generator[_Send | _Sleep, Answer | httpx.TransportError | None, T]


class RemoteScorer(OwnScorer):
    """Scores by asking a server that `bge-rerank serve` started; takes the place of a `Scorer`.

    Arguments, results and errors are those of `Scorer`. One instance may be used by any number of threads
    and tasks. Its connections are pooled: one pool for sync calls, and one for each event loop.

    A failed attempt is repeated if the connection failed, the server answered 429, 502, 503 or 504, or a
    proxy answered 500: after what `Retry-After` says or a growing, random delay, and only while the call's
    time is not over. Long lists go in several requests, one after the other.

    Copies are the same object. A pickle holds the settings but not the key, which is then read from the
    environment.

    Args:
        base_url: Address of the server, such as `https://host:8000` or one with a proxy's prefix.
        api_key: The server's key, as a string or a `SecretStr`; None takes `BGE_RERANK_API_KEY` from the
            environment, if it is set.
        timeout: Most seconds for each HTTP request, its repetitions included; None is no limit.
        max_retries: Most repetitions of one HTTP request.
        normalize: Scores from 0 to 1 instead of raw logits; False as in `Scorer`.
        client: A client for the sync methods instead of one of its own. It stays open.
        async_client: The same for the async methods.

    Raises:
        ConfigError: A setting cannot work.

    Example:
        >>> with RemoteScorer("http://127.0.0.1:8000") as scorer:
        ...     scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], top_n=1)
        [RankedPassage(index=1, score=..., truncated=False, windows=1)]
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
        self._key = ApiKey(os.environ.get(_API_KEY_VARIABLE) if api_key is None else api_key)
        if timeout is not None and not (_is_number(timeout) and 0 < timeout < math.inf):
            raise ConfigError("timeout must be a positive number of seconds or None")
        if not isinstance(max_retries, int) or isinstance(max_retries, bool) or max_retries < 0:
            raise ConfigError("max_retries must be an integer of at least 0")
        if not isinstance(normalize, bool):
            raise ConfigError("normalize must be True or False")
        self._timeout = timeout
        self._max_retries = max_retries
        self._normalize = normalize
        self._given_client = client
        self._given_async_client = async_client
        self._lock = threading.Lock()
        self._client: tuple[int, httpx.Client] | None = None  # with the process that made it
        self._async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._is_closed = False

    def score(self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None) -> list[float]:
        """Do what `Scorer.score` does; an iterator is read as it is scored.

        Args:
            pairs: (query, passage) pairs.
            timeout: Most seconds for the whole call; None is no limit but that of each HTTP request.

        Returns:
            One float a pair, in order.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which.
            AuthenticationError: The server does not accept the key.
            ServerUnreachableError: The server does not answer, or cannot take requests now.
            RequestTimeoutError: The time is over.
            RerankError: Otherwise, as `Scorer.score` does.
        """
        return self._run(self._score(pairs, _deadline(timeout)))

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]],
        *,
        timeout: float | None = None,
    ) -> list[float]:
        """Do what `score` does without blocking the event loop.

        An iterator is read in the caller's task, so one that blocks should be asynchronous.
        """
        deadline = _deadline(timeout)
        if not isinstance(pairs, AsyncIterable):
            return await self._arun(self._score(pairs, deadline))
        scores: list[float] = []
        async for chunk in acheck_stream(pairs, _MAX_PAIRS):
            scores += await self._arun(self._score_chunk(chunk, deadline, len(scores)))
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
        """Do what `Scorer.rank` does.

        Args:
            query: The query.
            passages: Texts to rank.
            top_n: Most passages to return; None is all, 0 is none.
            threshold: Least score to return, inclusive; None returns every score.
            timeout: Most seconds for the whole call; None is no limit but that of each HTTP request.
            normalize: Scores from 0 to 1 or raw logits; None is as this scorer was made.

        Returns:
            A list of `RankedPassage`, best first, equal scores in input order.

        Raises:
            InputError: An argument is of the wrong type or out of range; `.index` says which passage.
            RerankError: Otherwise, as `score` does.
        """
        return self._run(self._rank_one(query, passages, top_n, threshold, timeout, normalize))

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
        """Do what `rank` does without blocking the event loop."""
        return await self._arun(self._rank_one(query, passages, top_n, threshold, timeout, normalize))

    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do what `Scorer.rank_many` does.

        Args:
            requests: (query, passages) of each request.
            top_n: As in `rank`, for each request.
            threshold: As in `rank`, for each request.
            timeout: As in `rank`, for all requests together.
            normalize: As in `rank`.

        Returns:
            One ranking a request, in order.

        Raises:
            InputError: As `rank` does; `.index` says which request.
            RerankError: Otherwise, as `score` does.
        """
        return self._run(self._rank_many(requests, top_n, threshold, timeout, normalize))

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do what `rank_many` does without blocking the event loop."""
        return await self._arun(self._rank_many(requests, top_n, threshold, timeout, normalize))

    def to_dict(self) -> dict[str, str | float | bool | None]:
        """Return the settings as a dict that JSON can hold, without the key; `from_dict` takes it back."""
        return {
            "base_url": self._base_url,
            "timeout": self._timeout,
            "max_retries": self._max_retries,
            "normalize": self._normalize,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RemoteScorer:
        """Build a scorer from what `to_dict` returned; the key comes from the environment.

        Raises:
            ConfigError: A setting is unknown, missing or not valid.
        """
        known = {"base_url", "timeout", "max_retries", "normalize"}
        unknown = sorted(set(data) - known)
        if unknown or "base_url" not in data:
            raise ConfigError(f"the settings must be base_url and of {sorted(known)}; unknown: {unknown}")
        return cls(**data)

    def close(self) -> None:
        """Refuse further calls and close the sync connections; may be called twice.

        Async connections belong to their event loop: `aclose` closes them.
        """
        self._is_closed = True
        with self._lock:
            client, self._client = self._client, None
        if client is not None and client[0] == os.getpid():
            client[1].close()

    async def aclose(self) -> None:
        """Do what `close` does, and close the connections of the running event loop."""
        self.close()
        client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

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

    # Connections cannot be copied, and there is no need to.
    def __copy__(self) -> RemoteScorer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> RemoteScorer:
        return self

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Any]], RemoteScorer], tuple[dict[str, Any]]]:
        if self._given_client is not None or self._given_async_client is not None:
            raise ConfigError("a RemoteScorer with a client of yours cannot be pickled")
        return RemoteScorer.from_dict, (self.to_dict(),)

    def _score(self, pairs: Iterable[tuple[str, str]], deadline: float | None) -> _Steps[list[float]]:
        chunks: Iterable[list[tuple[str, str]]]
        # A list is checked before any of it is sent; an iterator can only be checked as it is read.
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
        cut = _Cut(None, None, self._normalize)
        rankings = yield from self._rank_checked(requests, cut, deadline, only_scores=True, start=start)
        in_order = [sorted(ranking, key=lambda passage: passage.index) for ranking in rankings]
        return [passage.score for ranking in in_order for passage in ranking]

    def _rank_one(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None,
        threshold: float | None,
        timeout: float | None,
        normalize: bool | None,
    ) -> _Steps[Ranking]:
        cut = self._cut(top_n, threshold, normalize)
        texts = check_passages(passages)
        rankings = yield from self._rank_checked([(check_query(query), texts)], cut, _deadline(timeout))
        return rankings[0]

    def _rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None,
        threshold: float | None,
        timeout: float | None,
        normalize: bool | None,
    ) -> _Steps[list[Ranking]]:
        cut = self._cut(top_n, threshold, normalize)
        return (yield from self._rank_checked(check_requests(requests), cut, _deadline(timeout)))

    def _cut(self, top_n: int | None, threshold: float | None, normalize: bool | None) -> _Cut:
        check_top_n(top_n)
        scale = self._normalize if normalize is None else normalize
        check_threshold(threshold, normalize=scale)
        return _Cut(top_n, threshold, scale)

    def _rank_checked(
        self,
        requests: Sequence[tuple[str, list[str]]],
        cut: _Cut,
        deadline: float | None,
        *,
        only_scores: bool = False,
        start: int = 0,
    ) -> _Steps[list[Ranking]]:
        """Rank requests, in as many HTTP requests as it takes.

        Args:
            requests: (query, passages) of each request, checked.
            cut: What to keep of each ranking, and on which scale.
            deadline: When the call's time is over, on the monotonic clock.
            only_scores: Score every pair as `score` does.
            start: Index of the first pair, for errors.
        """
        if self._is_closed:
            raise ScorerClosedError("this scorer was closed; make a new one")
        ranked: list[tuple[Fragment, Ranking]] = []
        for part in split_requests(requests, max_pairs=_MAX_PAIRS, max_characters=_MAX_CHARACTERS):
            body = {
                "requests": [(fragment.query, fragment.passages) for fragment in part],
                "top_n": cut.top_n,
                "only_scores": only_scores,
            }
            try:
                rankings = yield from self._exchange(body, deadline)
            except NonFiniteScoreError as error:
                index = start + (error.index or 0)
                raise NonFiniteScoreError(
                    f"the model's score of pair {index} is not finite", index=index
                ) from None
            if len(rankings) != len(part):
                raise_unusable()
            ranked.extend(zip(part, rankings, strict=True))
            start += sum(len(fragment.passages) for fragment in part)
        # Logits come over the wire, since the order is theirs; the scale is applied here.
        return merge_rankings(
            len(requests), ranked, top_n=cut.top_n, threshold=cut.threshold, normalize=cut.normalize
        )

    def _exchange(self, body: Mapping[str, Any], deadline: float | None) -> _Steps[list[Ranking]]:
        """Post a body, several times if need be, and return the rankings of the answer."""
        own_deadline = _deadline(self._timeout)
        deadlines = [each for each in (deadline, own_deadline) if each is not None]
        for attempt in count():
            left_s = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
            if left_s == 0:
                raise RequestTimeoutError("the server did not answer within the timeout")
            content = json.dumps({**body, "timeout_s": left_s}, ensure_ascii=False)
            # A lone surrogate goes as it is; the server's scorer treats it as a local one would.
            outcome = yield _Send(content.encode("utf-8", "surrogatepass"), left_s)
            if isinstance(outcome, Answer) and outcome.status == 200:
                return parse_rankings(outcome.content)
            error = error_of(outcome)
            delay_s = retry_delay(outcome, error, attempt)
            left_s = min(deadlines) - time.monotonic() if deadlines else math.inf
            if delay_s is None or attempt >= self._max_retries or delay_s >= left_s:
                raise error from (outcome if isinstance(outcome, Exception) else None)
            yield _Sleep(delay_s)
        raise AssertionError("unreachable")

    def _run(self, steps: _Steps[T]) -> T:
        return _drive(steps, self._do)

    async def _arun(self, steps: _Steps[T]) -> T:
        return await _adrive(steps, self._ado)

    def _do(self, step: _Send | _Sleep) -> Answer | httpx.TransportError | None:
        if isinstance(step, _Sleep):
            time.sleep(step.seconds)
            return None
        deadline = _deadline(step.timeout_s)
        try:
            with self._sync_client().stream(
                "POST", self._base_url + _PATH, **self._request(step)
            ) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    # The client's own limit is for each read.
                    if deadline is not None and time.monotonic() > deadline:
                        return httpx.ReadTimeout("the response took too long")
                return Answer(response.status_code, response.headers, bytes(content))
        except httpx.DecodingError:
            raise_unusable()
        except httpx.TransportError as error:
            return error

    async def _ado(self, step: _Send | _Sleep) -> Answer | httpx.TransportError | None:
        if isinstance(step, _Sleep):
            await asyncio.sleep(step.seconds)
            return None
        post = self._async_client().post(self._base_url + _PATH, **self._request(step))
        try:
            response = await asyncio.wait_for(post, step.timeout_s)
            return Answer(response.status_code, response.headers, response.content)
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            return httpx.ReadTimeout("the response took too long")
        except httpx.DecodingError:
            raise_unusable()
        except httpx.TransportError as error:
            return error

    def _request(self, step: _Send) -> dict[str, Any]:
        headers = {"content-type": "application/json", **self._key.headers()}
        return {"content": step.content, "headers": headers, "timeout": step.timeout_s}

    def _sync_client(self) -> httpx.Client:
        if self._given_client is not None:
            return self._given_client
        with self._lock:
            # A forked child must not write into the connections of its parent.
            if self._client is None or self._client[0] != os.getpid():
                self._client = os.getpid(), httpx.Client()
            return self._client[1]

    def _async_client(self) -> httpx.AsyncClient:
        if self._given_async_client is not None:
            return self._given_async_client
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._async_clients.get(loop)
            if client is None:
                client = self._async_clients[loop] = httpx.AsyncClient()
            return client


def _drive(steps: _Steps[T], do: Callable[[_Send | _Sleep], Answer | httpx.TransportError | None]) -> T:
    outcome: Answer | httpx.TransportError | None = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result
        outcome = do(step)


async def _adrive(
    steps: _Steps[T],
    do: Callable[[_Send | _Sleep], Awaitable[Answer | httpx.TransportError | None]],
) -> T:
    outcome: Answer | httpx.TransportError | None = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result
        outcome = await do(step)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _deadline(timeout: float | None) -> float | None:
    check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout
