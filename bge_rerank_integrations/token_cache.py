"""Ids of recently seen passages: the same ones come back in retrieval, and a fast GPU outruns tokenizing."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final

import numpy as np
import numpy.typing as npt

Encoded = tuple[npt.NDArray[np.int32], bool]
"""A text's first ids, read-only, and whether it has more."""

# Hashing a longer text costs more than the first of its tokens do.
_MAX_CHARACTERS: Final = 1 << 16
# What an entry takes besides its ids, in ids.
_ENTRY_TOKENS: Final = 100


class TokenCache:
    """A bounded map from texts to their ids; any number of threads may share one.

    Texts are kept as digests only. Least recently used entries go first.

    Args:
        max_tokens: Most ids to keep, four bytes each; an entry counts as a hundred more than it has.

    Attributes:
        hits: How often a text was found.
    """

    def __init__(self, max_tokens: int) -> None:
        self.hits = 0
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._entries: OrderedDict[bytes, Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> Encoded | None:
        """Return what was put for a text, if it is still there."""
        key = _digest(text)
        if key is None:
            return None
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self.hits += 1
            return entry

    def put(self, text: str, encoded: Encoded) -> None:
        """Keep a text's ids; one that would take more than an eighth of the cache is not kept."""
        size = len(encoded[0]) + _ENTRY_TOKENS
        key = _digest(text) if size <= self._max_tokens // 8 else None
        if key is None:
            return
        encoded[0].flags.writeable = False
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = encoded
            self._num_tokens += size
            while self._num_tokens > self._max_tokens:
                _, (ids, _) = self._entries.popitem(last=False)
                self._num_tokens -= len(ids) + _ENTRY_TOKENS


def _digest(text: str) -> bytes | None:
    if len(text) > _MAX_CHARACTERS:
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
