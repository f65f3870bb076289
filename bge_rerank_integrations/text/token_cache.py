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
        misses: How often one was not.
    """

    def __init__(self, max_tokens: int) -> None:
        self.hits = self.misses = 0
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._entries: OrderedDict[bytes, Encoded] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(text: str) -> bytes | None:
        """Return a text's digest; None for one too long to be kept."""
        if len(text) > _MAX_CHARACTERS:
            return None
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def get(self, key: bytes | None) -> Encoded | None:
        """Return what was put for a text, if it is still there."""
        with self._lock:
            entry = None if key is None else self._entries.get(key)
            if key is None or entry is None:
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return entry

    def put(self, key: bytes | None, encoded: Encoded) -> None:
        """Keep a text's ids; what would take more than an eighth of the cache is not kept."""
        size = len(encoded[0]) + _ENTRY_TOKENS
        if key is None or size > self._max_tokens // 8:
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
