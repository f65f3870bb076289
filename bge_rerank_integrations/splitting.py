"""Splits requests into parts of limited size, and merges the rankings and errors of the parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from bge_rerank_integrations.errors import InputError, NonFiniteScoreError
from bge_rerank_integrations.ranking import RankedPassage, Ranking, Selection, select, sigmoid

# A count that is the same in all fragments of a request. It must not be added up.
_COUNT_OF_THE_QUERY: Final = "num_truncated_queries"
_REQUEST: Final = re.compile(r"\brequest \d+\b")
_PASSAGE: Final = re.compile(r"\bpassage (\d+)\b")


class Fragment(NamedTuple):
    """Neighbouring passages of one request.

    Attributes:
        request: Position of the request.
        start: Position of the first passage in the request.
        query: The query of the request.
        passages: The passages.
    """

    request: int
    start: int
    query: str
    passages: list[str]


def split_requests(
    requests: Iterable[tuple[str, Sequence[str]]], *, max_pairs: int, max_characters: int
) -> Iterator[list[Fragment]]:
    """Split requests into parts. A long request is divided, and short requests share a part.

    Args:
        requests: (query, passages) of each request. They are read when a part is taken.
        max_pairs: Maximum number of passages in a part.
        max_characters: Maximum number of characters in a part, queries included. A longer pair is a part by
            itself.

    Yields:
        The fragments of one part, in order. A request without passages is in no part.

    Example:
        >>> [len(part) for part in split_requests([("a", "xyz"), ("b", "x")], max_pairs=2, max_characters=99)]
        [1, 2]
    """
    part: list[Fragment] = []
    num_pairs = num_characters = 0
    for position, (query, passages) in enumerate(requests):
        fragment: Fragment | None = None
        for index, passage in enumerate(passages):
            size = len(passage) + (len(query) if fragment is None else 0)
            if part and (num_pairs == max_pairs or num_characters + size > max_characters):
                yield part
                part, fragment = [], None
                num_pairs = num_characters = 0
                size = len(query) + len(passage)
            if fragment is None:
                fragment = Fragment(position, index, query, [])
                part.append(fragment)
            fragment.passages.append(passage)
            num_pairs += 1
            num_characters += size
    if part:
        yield part


def merge_rankings(
    num_requests: int, parts: Iterable[tuple[Fragment, Ranking]], selection: Selection
) -> list[Ranking]:
    """Merge the rankings of fragments, whose scores are raw logits, into one ranking for each request.

    Args:
        num_requests: Number of requests.
        parts: Each fragment and the ranking of its passages.
        selection: The passages to keep of each request, and the scale of their scores.

    Returns:
        One ranking for each request, in order. Its counts are the sums over its fragments. A query that lost
        tokens counts once.
    """
    passages: list[list[RankedPassage]] = [[] for _ in range(num_requests)]
    counts: list[dict[str, int]] = [{} for _ in range(num_requests)]
    for fragment, ranking in parts:
        passages[fragment.request] += [
            dataclasses.replace(passage, index=fragment.start + passage.index) for passage in ranking
        ]
        total = counts[fragment.request]
        for name, count in vars(ranking).items():
            before = total.get(name, 0)
            total[name] = max(before, count) if name == _COUNT_OF_THE_QUERY else before + count
    return [Ranking(_select(kept, selection), **total) for kept, total in zip(passages, counts, strict=True)]


def error_of_call(error: InputError, part: Sequence[Fragment], *, names_request: bool) -> InputError:
    """Return the error of a part as the undivided call would raise it.

    A scorer names the passage in the error of a call for one request, and the request in the error of a call
    for several requests.

    Args:
        error: The error of a call for the fragments of `part`.
        part: The fragments.
        names_request: Whether the undivided call has several requests, so that its errors name the request.

    Returns:
        An error of the same type. Index and message have the numbers of the undivided call.

    Example:
        >>> error = InputError("passage 1 is blank", index=1)
        >>> error_of_call(error, [Fragment(0, 10, "panda", ["a bear", ""])], names_request=False).index
        11
    """
    position = 0 if len(part) == 1 else error.index
    if position is None or not 0 <= position < len(part):
        return error
    fragment = part[position]
    message = _PASSAGE.sub(lambda match: f"passage {fragment.start + int(match[1])}", str(error))
    if names_request:
        name = f"request {fragment.request}"
        message = f"{name}: {message}" if len(part) == 1 else _REQUEST.sub(name, message, count=1)
        return type(error)(message, index=fragment.request)
    is_known = error.index is not None and error.index < len(fragment.passages)
    return type(error)(message, index=fragment.start + (error.index or 0) if is_known else None)


def score_error_of_call(error: NonFiniteScoreError, num_before: int) -> NonFiniteScoreError:
    """Return the error of a part as the undivided call would raise it.

    Args:
        error: The error of the part. Its index counts the pairs of the part.
        num_before: Number of pairs before the part.
    """
    index = num_before + (error.index or 0)
    return NonFiniteScoreError(f"the model's score of pair {index} is not finite", index=index)


def _select(passages: Sequence[RankedPassage], selection: Selection) -> list[RankedPassage]:
    """Order passages by their logits, equal ones in input order, and cut the list."""
    in_order = sorted(passages, key=lambda passage: passage.index)
    logits = [passage.score for passage in in_order]
    if selection.normalize:
        in_order = [dataclasses.replace(passage, score=sigmoid(passage.score)) for passage in in_order]
    return select(in_order, logits, selection.top_n, selection.threshold)
