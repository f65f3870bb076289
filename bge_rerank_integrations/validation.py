"""Checks of the arguments of a call, made before any work is done. Messages contain indices, never texts."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any, Final

from bge_rerank_integrations.errors import InputError, InputTypeError

Pair = tuple[str, str]
"""A query and a passage."""

# A year. Some larger numbers, including infinity, overflow the timeouts of the operating system's locks.
MAX_TIMEOUT_S: Final = 31_536_000

BLANK_QUERY: Final = "the query is blank"

# For a longer text, a check of every character takes longer than tokenization, which stops early.
_MAX_BLANK_CHARACTERS: Final = 1 << 16


def is_blank(text: str) -> bool:
    """Return whether a text consists of white space, control characters and format characters only.

    Format characters have the Unicode category Cf. Zero-width spaces and soft hyphens are examples.
    """
    text = text.strip()
    return len(text) <= _MAX_BLANK_CHARACTERS and all(
        character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text
    )


def check_query(query: Any, *, may_be_blank: bool = False) -> str:
    """Return a query, if it is valid.

    Args:
        query: The query.
        may_be_blank: Whether it may be blank, as in pairs to score. The query of a ranking must not be blank.

    Raises:
        InputTypeError: The query is not a string.
        InputError: The query is blank.
    """
    if not isinstance(query, str):
        raise InputTypeError(f"the query must be a string, not {_kind(query)}")
    text = _plain(query)
    if not may_be_blank and is_blank(text):
        raise InputError(BLANK_QUERY)
    return text


def check_passages(passages: Any) -> list[str]:
    """Return passages as a list.

    Raises:
        InputTypeError: A passage is not a string; `.index` says which one.
    """
    # The items of these types are no passages, but characters, numbers or keys.
    if isinstance(passages, str | bytes | bytearray | Mapping) or not isinstance(passages, Iterable):
        raise InputTypeError(f"passages must be a sequence of strings, not {_kind(passages)}")
    refuse_without_order("passages", passages)
    checked = list(passages)
    for index, passage in enumerate(checked):
        if not isinstance(passage, str):
            raise InputTypeError(f"passage {index} must be a string, not {_kind(passage)}", index=index)
    return list(map(_plain, checked))


def refuse_without_order(name: str, values: Any) -> None:
    """Raise `InputTypeError` for a set, whose items have no index, or a table, whose items are columns."""
    if isinstance(values, set | frozenset):
        raise InputTypeError(f"{name} must be a sequence, not {_kind(values)}, which has no order")
    if any(kind.__name__ == "DataFrame" for kind in type(values).__mro__):  # of any library
        raise InputTypeError(f"{name} must be a sequence, not {_kind(values)}; give one of its columns")


def check_pairs(pairs: Any, *, start: int = 0) -> list[Pair]:
    """Return (query, passage) pairs as a list of tuples.

    Args:
        pairs: An iterable of pairs.
        start: The index of the first pair, for error messages.

    Raises:
        InputTypeError: A pair is not two strings; `.index` says which one.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise InputTypeError(f"pairs must be a list of (query, passage) pairs, not {_kind(pairs)}")
    refuse_without_order("pairs", pairs)
    checked: list[Pair] = []
    for index, pair in enumerate(pairs, start=start):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputTypeError(
                f"pair {index} must be a (query, passage) tuple, not {_kind(pair)}; a single pair goes "
                "into a list",
                index=index,
            )
        query, passage = pair
        if not (isinstance(query, str) and isinstance(passage, str)):
            name, text = ("passage", passage) if isinstance(query, str) else ("query", query)
            raise InputTypeError(
                f"the {name} of pair {index} must be a string, not {_kind(text)}", index=index
            )
        checked.append((_plain(query), _plain(passage)))
    return checked


def check_stream(pairs: Iterator[Pair], num_pairs: int) -> Iterator[list[Pair]]:
    """Read an iterator in lists of at most `num_pairs` pairs, and check each list with `check_pairs`."""
    start = 0
    while part := list(islice(pairs, num_pairs)):
        yield check_pairs(part, start=start)
        start += len(part)


async def acheck_stream(pairs: AsyncIterable[Pair], num_pairs: int) -> AsyncGenerator[list[Pair]]:
    """Do the same as `check_stream` for an asynchronous iterable."""
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
    requests: Any, check: Callable[[Any], list[str]] | None = None, *, may_be_blank: bool = False
) -> list[tuple[str, list[str]]]:
    """Return requests as a list of (query, passages) tuples.

    Args:
        requests: An iterable of (query, passages) requests.
        check: Checks the passages of one request and returns them as a list of strings. None stands for
            `check_passages`.
        may_be_blank: As in `check_query`.

    Raises:
        InputError: A request is invalid; `.index` says which one.
    """
    if isinstance(requests, str) or not isinstance(requests, Iterable):
        raise InputTypeError(f"requests must be a list of (query, passages) tuples, not {_kind(requests)}")
    refuse_without_order("requests", requests)
    checked = []
    for index, request in enumerate(requests):
        if not isinstance(request, tuple | list) or len(request) != 2:
            raise InputTypeError(
                f"request {index} must be a (query, passages) tuple, not {_kind(request)}", index=index
            )
        with naming_request(index):
            query = check_query(request[0], may_be_blank=may_be_blank)
            checked.append((query, (check or check_passages)(request[1])))
    return checked


@contextmanager
def naming_request(index: int) -> Iterator[None]:
    """Let an `InputError` in this block say which request of a call is invalid."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"request {index}: {error}", index=index) from None


def reason_of(error: InputError) -> str:
    """Return the message of an error without the request that `naming_request` has named."""
    return str(error).removeprefix(f"request {error.index}: ")


def group_pairs(pairs: Iterable[Pair]) -> list[tuple[str, list[str]]]:
    """Return pairs as (query, passages) requests. Neighbours with the same query share a request."""
    groups = groupby(pairs, key=lambda pair: pair[0])
    return [(query, [passage for _, passage in group]) for query, group in groups]


def check_timeout(timeout: float | None) -> None:
    """Raise `InputError` unless a timeout is None or a number of seconds from 0 to `MAX_TIMEOUT_S`."""
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise InputTypeError(f"timeout must be a number of seconds or None, not {_kind(timeout)}")
    if not 0 <= timeout <= MAX_TIMEOUT_S:  # also True for NaN
        raise InputError(f"timeout must be from 0 to {MAX_TIMEOUT_S:,} seconds, or None for no limit")


def is_single_pair(pairs: Any) -> bool:
    """Return whether the argument is one (query, passage) pair rather than a list of pairs."""
    return isinstance(pairs, Sequence) and len(pairs) == 2 and all(isinstance(p, str) for p in pairs)


def _plain(text: str) -> str:
    """Return a string without the methods of a subclass, which may do something else."""
    return text if type(text) is str else str.__str__(text)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, tuple | list) else name
