"""Calls to a scorer that runs elsewhere: divided into parts of limited size, and retried after failures.

`RemoteScorer` and the scorer of a Ray Serve application share this module. They differ in how they send a
part and how they read the outcome.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from bge_rerank_integrations.batching.timeouts import Countdown, start_countdown
from bge_rerank_integrations.errors import (
    ConfigError,
    InputError,
    NonFiniteScoreError,
    RequestTimeoutError,
    RerankError,
)
from bge_rerank_integrations.ranking import Ranking, Selection, check_selection
from bge_rerank_integrations.runtime.steps import Sleep
from bge_rerank_integrations.splitting import (
    Fragment,
    error_of_call,
    merge_rankings,
    score_error_of_call,
    split_requests,
)
from bge_rerank_integrations.validation import (
    MAX_TIMEOUT_S,
    check_pairs,
    check_passages,
    check_query,
    check_stream,
    group_pairs,
)

Step = TypeVar("Step")
Outcome = TypeVar("Outcome")

# Limits of one part. A longer list takes several parts, one after the other.
MAX_PAIRS: Final = 1024
_MAX_CHARACTERS: Final = 1_000_000
_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 8.0


class Part(NamedTuple):
    """What one part of a call asks for.

    Attributes:
        requests: (query, passages) of each request.
        top_n: Maximum number of passages to return of each request. None returns all.
        only_scores: Whether to score all pairs as `score` does, including those with a blank passage.
    """

    requests: list[tuple[str, list[str]]]
    top_n: int | None
    only_scores: bool


class Failure(NamedTuple):
    """A failed attempt.

    Attributes:
        error: What to raise if the part is not retried.
        delay_s: Seconds to wait before the next attempt. None means that another attempt cannot succeed.
    """

    error: RerankError
    delay_s: float | None


def random_delay_s(attempt: int) -> float:
    """Return a delay that grows with the number of attempts. The random part spreads many callers."""
    return min(_FIRST_DELAY_S * 2.0**attempt, _MAX_DELAY_S) * random.uniform(0.5, 1.0)


class DividedCalls(Generic[Step, Outcome]):
    """The calls of one scorer, as generators of steps; see `runtime.steps`.

    Args:
        send: Makes the step that sends a part, given the seconds that are left. None means no limit.
        read: Returns the raw logits of a part, or the failure, given the outcome of the step and the number
            of earlier attempts.
        check_open: Raises an exception if the scorer is closed.
        timeout: Maximum duration of each part in seconds, retries included. None means no limit.
        max_retries: Maximum number of retries of one part.
        normalize: Whether to apply a sigmoid to the scores, unless a call says otherwise.
        timed_out: Message of the exception for a part that had no time left.

    Raises:
        ConfigError: `timeout`, `max_retries` or `normalize` is invalid.
    """

    def __init__(
        self,
        send: Callable[[Part, float | None], Step],
        read: Callable[[Part, Outcome, int], list[Ranking] | Failure],
        *,
        check_open: Callable[[], None],
        timeout: float | None,
        max_retries: int,
        normalize: bool,
        timed_out: str,
    ) -> None:
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and 0 < timeout <= MAX_TIMEOUT_S):
            raise ConfigError(f"timeout must be above 0 and at most {MAX_TIMEOUT_S:,} seconds, or None")
        if not isinstance(max_retries, int) or isinstance(max_retries, bool) or max_retries < 0:
            raise ConfigError("max_retries must be an integer of at least 0")
        if not isinstance(normalize, bool):
            raise ConfigError("normalize must be True or False")
        self._send = send
        self._read = read
        self._check_open = check_open
        self._timeout = timeout
        self._max_retries = max_retries
        self._normalize = normalize
        self._timed_out = timed_out

    def score(
        self, pairs: Iterable[tuple[str, str]], remaining: Countdown
    ) -> Generator[Step | Sleep, Outcome, list[float]]:
        """Score pairs. A list is checked before any of it is sent, and an iterator while it is read."""
        chunks: Iterable[list[tuple[str, str]]]
        chunks = check_stream(pairs, MAX_PAIRS) if isinstance(pairs, Iterator) else [check_pairs(pairs)]
        scores: list[float] = []
        for chunk in chunks:
            scores += yield from self.score_chunk(chunk, remaining, len(scores))
        return scores

    def score_chunk(
        self, pairs: list[tuple[str, str]], remaining: Countdown, start: int
    ) -> Generator[Step | Sleep, Outcome, list[float]]:
        """Score checked pairs. `start` is the index of the first one, for error messages."""
        selection = Selection(None, None, self._normalize)
        rankings = yield from self._rank(
            group_pairs(pairs), selection, remaining, only_scores=True, start=start
        )
        in_order = [sorted(ranking, key=lambda passage: passage.index) for ranking in rankings]
        return [passage.score for ranking in in_order for passage in ranking]

    def rank(
        self, query: str, passages: Sequence[str], selection: Selection, remaining: Countdown
    ) -> Generator[Step | Sleep, Outcome, Ranking]:
        """Rank the passages of one query."""
        texts = check_passages(passages)
        rankings = yield from self._rank([(check_query(query), texts)], selection, remaining)
        return rankings[0]

    def rank_many(
        self, requests: list[tuple[str, list[str]]], selection: Selection, remaining: Countdown
    ) -> Generator[Step | Sleep, Outcome, list[Ranking]]:
        """Rank the passages of several checked requests. An error names the request, not the passage."""
        return self._rank(requests, selection, remaining, names_request=True)

    def select(self, top_n: int | None, threshold: float | None, normalize: bool | None) -> Selection:
        """Return the checked options of a ranking. Without `normalize`, the setting of the scorer applies."""
        scale = self._normalize if normalize is None else normalize
        return check_selection(top_n, threshold, normalize=scale)

    def _rank(
        self,
        requests: Sequence[tuple[str, list[str]]],
        selection: Selection,
        remaining: Countdown,
        *,
        names_request: bool = False,
        only_scores: bool = False,
        start: int = 0,
    ) -> Generator[Step | Sleep, Outcome, list[Ranking]]:
        """Rank checked requests, in as many parts as necessary."""
        self._check_open()
        ranked: list[tuple[Fragment, Ranking]] = []
        for fragments in split_requests(requests, max_pairs=MAX_PAIRS, max_characters=_MAX_CHARACTERS):
            part = Part([(each.query, each.passages) for each in fragments], selection.top_n, only_scores)
            try:
                rankings = yield from self._repeat(part, remaining)
            except NonFiniteScoreError as error:
                raise score_error_of_call(error, start) from None
            except InputError as error:
                raise error_of_call(error, fragments, names_request=names_request) from None
            ranked.extend(zip(fragments, rankings, strict=True))
            start += sum(len(fragment.passages) for fragment in fragments)
        # Parts return logits, because they decide the order. The sigmoid is applied here.
        return merge_rankings(len(requests), ranked, selection)

    def _repeat(self, part: Part, remaining: Countdown) -> Generator[Step | Sleep, Outcome, list[Ranking]]:
        """Send a part until it succeeds, its time is over or there were enough attempts."""
        remaining_of_part = start_countdown(self._timeout)
        attempt = 0
        while True:
            left_s = _shorter(remaining(), remaining_of_part())
            if left_s == 0:
                raise RequestTimeoutError(self._timed_out)
            self._check_open()
            outcome = yield self._send(part, left_s)
            answer = self._read(part, outcome, attempt)
            if isinstance(answer, list):
                return answer
            error, delay_s = answer
            left_s = _shorter(remaining(), remaining_of_part())
            is_late = delay_s is not None and left_s is not None and delay_s >= left_s
            if delay_s is None or attempt >= self._max_retries or is_late:
                raise error
            yield Sleep(delay_s)
            attempt += 1


def _shorter(first_s: float | None, second_s: float | None) -> float | None:
    """Return the shorter of two times. None means no limit."""
    return min((each for each in (first_s, second_s) if each is not None), default=None)
