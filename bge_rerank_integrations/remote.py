"""`RemoteScorer`: the methods of `Scorer`, with scores from a server that `bge-rerank serve` runs."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from bge_rerank_integrations.errors import (
    ConfigError,
    InputError,
    NonFiniteScoreError,
    RequestTimeoutError,
    ScorerClosedError,
)
from bge_rerank_integrations.protocols import OwnScorer
from bge_rerank_integrations.ranking import Ranking, Selection, check_selection
from bge_rerank_integrations.remote_transport import Send, Sleep, Steps, Transport
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
from bge_rerank_integrations.splitting import Fragment, error_of_call, merge_rankings, split_requests
from bge_rerank_integrations.validation import (
    acheck_stream,
    check_pairs,
    check_passages,
    check_query,
    check_requests,
    check_stream,
    check_timeout,
    group_pairs,
)

if TYPE_CHECKING:
    import httpx

_API_KEY_VARIABLE: Final = "BGE_RERANK_API_KEY"
_PATH: Final = "/v1/rank"

# Limits of one HTTP request. A longer list of pairs is sent in several requests, one after the other.
_MAX_PAIRS: Final = 1024
_MAX_CHARACTERS: Final = 1_000_000


class RemoteScorer(OwnScorer):
    """Scores pairs on a server that `bge-rerank serve` runs. It can replace a `Scorer`.

    The methods have the arguments, results and errors of `Scorer`. Any number of threads and asyncio tasks
    can use one instance. It has one pool of connections for sync calls, and one for each event loop.

    An HTTP request is repeated if the connection fails, if the server answers with status 429, 502, 503 or
    504, or if a proxy answers 500. The delay before the next attempt is the one in the header `Retry-After`,
    or a random delay that grows with each attempt. No attempt starts after the timeout of the call. A long
    list of passages is sent in several HTTP requests, one after the other.

    A copy is the same object. A pickle contains the settings but not the API key. The unpickled scorer reads
    the key from the environment.

    Args:
        base_url: Address of the server, such as `https://host:8000`. It may contain a path, for a server
            behind a proxy.
        api_key: The API key of the server, as a string or a `SecretStr`. None uses the environment variable
            `BGE_RERANK_API_KEY`, if it is set.
        timeout: Maximum duration of each HTTP request in seconds, repetitions included. None is no limit.
        max_retries: Maximum number of repetitions of one HTTP request.
        normalize: Whether to apply a sigmoid to the scores. The default is False, as in `Scorer`.
        client: A client for the sync methods. It stays open. None creates a client at first use.
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
        self._transport = Transport(self._base_url + _PATH, self._key, client, async_client)
        self._is_closed = False

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
        return self._transport.run(self._score(pairs, _deadline(timeout)))

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]],
        *,
        timeout: float | None = None,
    ) -> list[float]:
        """Do the same as `score` without blocking the event loop.

        An iterator is read in the caller's task. An iterator that waits should therefore be asynchronous.
        """
        deadline = _deadline(timeout)
        if not isinstance(pairs, AsyncIterable):
            return await self._transport.arun(self._score(pairs, deadline))
        scores: list[float] = []
        async for chunk in acheck_stream(pairs, _MAX_PAIRS):
            scores += await self._transport.arun(self._score_chunk(chunk, deadline, len(scores)))
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
        return self._transport.run(self._rank_one(query, passages, top_n, threshold, timeout, normalize))

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
        return await self._transport.arun(
            self._rank_one(query, passages, top_n, threshold, timeout, normalize)
        )

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
        return self._transport.run(self._rank_many(requests, top_n, threshold, timeout, normalize))

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
        return await self._transport.arun(self._rank_many(requests, top_n, threshold, timeout, normalize))

    def to_dict(self) -> dict[str, str | float | bool | None]:
        """Return the settings, without the API key, as a JSON-serializable dict for `from_dict`."""
        return {
            "base_url": self._base_url,
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
        known = {"base_url", "timeout", "max_retries", "normalize"}
        unknown = sorted(set(data) - known)
        if unknown or "base_url" not in data:
            raise ConfigError(f"the settings must be base_url and of {sorted(known)}; unknown: {unknown}")
        return cls(**data)

    def close(self) -> None:
        """Reject new calls and close the connections of sync calls. It is safe to call this twice.

        Connections of async calls belong to their event loop. `aclose` closes them.
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

    # Connections cannot be copied. A copy is therefore the same scorer.
    def __copy__(self) -> RemoteScorer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> RemoteScorer:
        return self

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Any]], RemoteScorer], tuple[dict[str, Any]]]:
        if self._transport.has_given_client:
            raise ConfigError("a RemoteScorer that was created with a client cannot be pickled")
        return RemoteScorer.from_dict, (self.to_dict(),)

    def _score(self, pairs: Iterable[tuple[str, str]], deadline: float | None) -> Steps[list[float]]:
        chunks: Iterable[list[tuple[str, str]]]
        # A list is checked before any of it is sent. An iterator can only be checked while it is read.
        chunks = check_stream(pairs, _MAX_PAIRS) if isinstance(pairs, Iterator) else [check_pairs(pairs)]
        scores: list[float] = []
        for chunk in chunks:
            scores += yield from self._score_chunk(chunk, deadline, len(scores))
        return scores

    def _score_chunk(
        self, pairs: list[tuple[str, str]], deadline: float | None, start: int
    ) -> Steps[list[float]]:
        requests = group_pairs(pairs)
        selection = Selection(None, None, self._normalize)
        rankings = yield from self._rank_checked(requests, selection, deadline, only_scores=True, start=start)
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
    ) -> Steps[Ranking]:
        selection = self._select(top_n, threshold, normalize)
        texts = check_passages(passages)
        rankings = yield from self._rank_checked([(check_query(query), texts)], selection, _deadline(timeout))
        return rankings[0]

    def _rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None,
        threshold: float | None,
        timeout: float | None,
        normalize: bool | None,
    ) -> Steps[list[Ranking]]:
        selection = self._select(top_n, threshold, normalize)
        checked = check_requests(requests)
        return (yield from self._rank_checked(checked, selection, _deadline(timeout), names_request=True))

    def _select(self, top_n: int | None, threshold: float | None, normalize: bool | None) -> Selection:
        scale = self._normalize if normalize is None else normalize
        return check_selection(top_n, threshold, normalize=scale)

    def _rank_checked(
        self,
        requests: Sequence[tuple[str, list[str]]],
        selection: Selection,
        deadline: float | None,
        *,
        names_request: bool = False,
        only_scores: bool = False,
        start: int = 0,
    ) -> Steps[list[Ranking]]:
        """Rank requests with as many HTTP requests as necessary.

        Args:
            requests: The checked (query, passages) requests.
            selection: The passages to keep of each ranking, and the scale of the scores.
            deadline: The end of the call, by `time.monotonic`. None is no limit.
            names_request: Whether the index of an `InputError` is the position of the request. Otherwise it
                is the position of the passage.
            only_scores: Whether to score all pairs as `score` does, including those with a blank passage.
            start: Index of the first pair, for error messages.
        """
        if self._is_closed:
            raise ScorerClosedError("this scorer is closed; create a new one")
        ranked: list[tuple[Fragment, Ranking]] = []
        for part in split_requests(requests, max_pairs=_MAX_PAIRS, max_characters=_MAX_CHARACTERS):
            body = {
                "requests": [(fragment.query, fragment.passages) for fragment in part],
                "top_n": selection.top_n,
                "only_scores": only_scores,
            }
            try:
                rankings = yield from self._exchange(body, deadline)
            except NonFiniteScoreError as error:
                index = start + (error.index or 0)
                raise NonFiniteScoreError(
                    f"the model's score of pair {index} is not finite", index=index
                ) from None
            except InputError as error:
                raise error_of_call(error, part, names_request=names_request) from None
            if len(rankings) != len(part):
                raise_unusable()
            ranked.extend(zip(part, rankings, strict=True))
            start += sum(len(fragment.passages) for fragment in part)
        # The server returns logits, because they decide the order. The sigmoid is applied here.
        return merge_rankings(
            len(requests),
            ranked,
            top_n=selection.top_n,
            threshold=selection.threshold,
            normalize=selection.normalize,
        )

    def _exchange(self, body: Mapping[str, Any], deadline: float | None) -> Steps[list[Ranking]]:
        """Post a body, repeat it after failures, and return the rankings of the response."""
        own_deadline = _deadline(self._timeout)
        deadlines = [each for each in (deadline, own_deadline) if each is not None]
        for attempt in count():
            left_s = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
            if left_s == 0:
                raise RequestTimeoutError("the server did not answer within the timeout")
            content = json.dumps({**body, "timeout_s": left_s}, ensure_ascii=False)
            # A lone surrogate is sent unchanged. The server treats it like a local scorer does.
            outcome = yield Send(content.encode("utf-8", "surrogatepass"), left_s)
            if isinstance(outcome, Answer) and outcome.status == 200:
                return parse_rankings(outcome.content)
            error = error_of(outcome)
            delay_s = retry_delay(outcome, error, attempt)
            left_s = min(deadlines) - time.monotonic() if deadlines else math.inf
            if delay_s is None or attempt >= self._max_retries or delay_s >= left_s:
                raise error from (outcome if isinstance(outcome, Exception) else None)
            yield Sleep(delay_s)
        raise AssertionError("unreachable")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _deadline(timeout: float | None) -> float | None:
    check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout
