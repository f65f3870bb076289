"""Checks of one call's arguments, before any work is done. Messages give positions, never texts."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from bge_rerank_integrations.errors import InputError, InputTypeError

Pair = tuple[str, str]
"""A query and a passage."""

# A year. The operating system's locks refuse some larger numbers, infinity among them.
MAX_TIMEOUT_S: Final = 31_536_000

BLANK_QUERY: Final = "the query has nothing to read"

# Looking at every character of more than this takes longer than tokenizing the text.
_MAX_BLANK_CHARACTERS: Final = 1 << 16


def is_blank(text: str) -> bool:
    """Return whether a text holds nothing but white space, control and format characters.

    Format characters are those of Unicode's category Cf, such as zero-width spaces and soft hyphens.
    """
    text = text.strip()
    return len(text) <= _MAX_BLANK_CHARACTERS and all(
        character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text
    )


def check_query(query: Any) -> str:
    """Return the query of a ranking.

    Raises:
        InputTypeError: It is not a string.
        InputError: It is blank.
    """
    if not isinstance(query, str):
        raise InputTypeError(f"the query must be a string, not {_kind(query)}")
    if is_blank(query):
        raise InputError(BLANK_QUERY)
    return query


def check_passages(passages: Any) -> list[str]:
    """Return the passages as a list if they are strings, else raise `InputTypeError` with the index."""
    if isinstance(passages, str) or not isinstance(passages, Iterable):
        raise InputTypeError(f"passages must be a sequence of strings, not {_kind(passages)}")
    checked = list(passages)
    for index, passage in enumerate(checked):
        if not isinstance(passage, str):
            raise InputTypeError(f"passage {index} must be a string, not {_kind(passage)}", index=index)
    return checked


def check_pairs(pairs: Any, *, start: int = 0) -> list[Pair]:
    """Return an iterable of pairs as a list, else raise `InputTypeError` with the index.

    Args:
        pairs: The pairs.
        start: The index of the first.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise InputTypeError(f"pairs must be a list of (query, passage) pairs, not {_kind(pairs)}")
    checked: list[Pair] = []
    for index, pair in enumerate(pairs, start=start):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputTypeError(
                f"pair {index} must be a (query, passage) tuple, not {_kind(pair)}; a single pair goes "
                "into a list",
                index=index,
            )
        for name, text in zip(("query", "passage"), pair, strict=True):
            if not isinstance(text, str):
                raise InputTypeError(
                    f"the {name} of pair {index} must be a string, not {_kind(text)}", index=index
                )
        checked.append((pair[0], pair[1]))
    return checked


def check_stream(pairs: Iterator[Pair], num_pairs: int) -> Iterator[list[Pair]]:
    """Read an iterator of pairs so many at a time, and give each part as `check_pairs` does."""
    start = 0
    while part := list(islice(pairs, num_pairs)):
        yield check_pairs(part, start=start)
        start += len(part)


async def acheck_stream(pairs: AsyncIterable[Pair], num_pairs: int) -> AsyncIterator[list[Pair]]:
    """Do what `check_stream` does with an asynchronous iterable."""
    part: list[Pair] = []
    start = 0
    async for pair in pairs:
        part.append(pair)
        if len(part) == num_pairs:
            yield check_pairs(part, start=start)
            start += len(part)
            part = []
    if part:
        yield check_pairs(part, start=start)


def check_requests(
    requests: Any, check: Callable[[Any], list[str]] | None = None
) -> list[tuple[str, list[str]]]:
    """Return a list of (query, passages), else raise `InputError` with the request's index.

    Args:
        requests: (query, passages) of each request.
        check: What checks the passages of a request; None is `check_passages`.
    """
    if isinstance(requests, str) or not isinstance(requests, Iterable):
        raise InputTypeError(f"requests must be a list of (query, passages) tuples, not {_kind(requests)}")
    checked = []
    for index, request in enumerate(requests):
        if not isinstance(request, tuple | list) or len(request) != 2:
            raise InputTypeError(
                f"request {index} must be a (query, passages) tuple, not {_kind(request)}", index=index
            )
        try:
            checked.append((check_query(request[0]), (check or check_passages)(request[1])))
        except InputError as error:
            raise type(error)(f"request {index}: {error}", index=index) from None
    return checked


def check_timeout(timeout: float | None) -> None:
    """Raise unless a timeout is None or a number of seconds from 0 to a year."""
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise InputTypeError(f"timeout must be a number of seconds or None, not {_kind(timeout)}")
    if not 0 <= timeout <= MAX_TIMEOUT_S:  # NaN is not
        raise InputError(f"timeout must be from 0 to {MAX_TIMEOUT_S:,} seconds, or None for no limit")


def is_single_pair(pairs: Any) -> bool:
    """Whether an argument is one (query, passage) pair instead of a list of them."""
    return isinstance(pairs, Sequence) and len(pairs) == 2 and all(isinstance(p, str) for p in pairs)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, tuple | list) else name
