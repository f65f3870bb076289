"""Splitting requests into parts of bounded size, and merging the rankings of the parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from bge_rerank_integrations.ranking import RankedPassage, Ranking, select, sigmoid

# A count that is the same in all fragments of a request, so that it must not be added up.
_OF_THE_QUERY: Final = "num_truncated_queries"


class Fragment(NamedTuple):
    """Neighbouring passages of one request.

    Attributes:
        request: Position of the request.
        start: Position of the first passage in the request.
        query: The request's query.
        passages: The passages.
    """

    request: int
    start: int
    query: str
    passages: list[str]


def split_requests(
    requests: Iterable[tuple[str, Sequence[str]]], *, max_pairs: int, max_characters: int
) -> Iterator[list[Fragment]]:
    """Split requests into parts; a long request is cut, and short ones share a part.

    Args:
        requests: (query, passages) of each request; read as the parts are taken.
        max_pairs: Most passages in a part.
        max_characters: Most characters in a part, queries included; a single pair that is longer is a part
            by itself.

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
    num_requests: int,
    parts: Iterable[tuple[Fragment, Ranking]],
    *,
    top_n: int | None = None,
    threshold: float | None = None,
    normalize: bool = False,
) -> list[Ranking]:
    """Merge the rankings of fragments, whose scores are raw logits, into one ranking for each request.

    Args:
        num_requests: How many requests there are.
        parts: Each fragment and the ranking of its passages.
        top_n: Most passages to keep of each request; None keeps all.
        threshold: Least score to keep, inclusive and on the scale of the result; None keeps every passage.
        normalize: Whether to put the logits through a sigmoid.

    Returns:
        One ranking for each request, in order; its counts are the sums over its fragments.
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
            total[name] = max(before, count) if name == _OF_THE_QUERY else before + count
    return [
        Ranking(_select(kept, top_n, threshold, normalize=normalize), **total)
        for kept, total in zip(passages, counts, strict=True)
    ]


def _select(
    passages: Sequence[RankedPassage], top_n: int | None, threshold: float | None, *, normalize: bool
) -> list[RankedPassage]:
    """Order passages by their logits, equal ones in input order, and cut the list."""
    in_order = sorted(passages, key=lambda passage: passage.index)
    logits = [passage.score for passage in in_order]
    if normalize:
        in_order = [dataclasses.replace(passage, score=sigmoid(passage.score)) for passage in in_order]
    return select(in_order, logits, top_n, threshold)
