"""A cache of the token ids of recent passages.

Retrieval returns the same passages again and again, and a fast GPU computes faster than a CPU tokenizes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

import numpy as np
import numpy.typing as npt

from bge_rerank_integrations.runtime.locks import SafeLock

Encoded = tuple[npt.NDArray[np.int32], bool]
"""The first ids of a text, in a read-only array, and whether the text has more ids."""

# Hashing a longer text takes longer than encoding its first tokens.
_MAX_CHARACTERS: Final = 1 << 16
# Memory that an entry needs besides its ids, in units of ids (four bytes each).
_ENTRY_TOKENS: Final = 100


class TokenCache:
    """A thread-safe cache of limited size, from texts to their token ids.

    The cache stores digests of the texts, not the texts. It removes the least recently used entries first.

    Args:
        max_tokens: Maximum number of ids to store, four bytes each. An entry counts as its ids plus 100.

    Attributes:
        hits: Number of lookups that found the text.
        misses: Number of lookups that did not find the text.
    """

    def __init__(self, max_tokens: int) -> None:
        self.hits = self.misses = 0
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._entries: OrderedDict[bytes, Encoded] = OrderedDict()
        # It can be taken again, because a signal handler that scores may interrupt the thread that holds it.
        self._lock = SafeLock()

    @staticmethod
    def key(text: str) -> bytes | None:
        """Return the digest of a text, or None if the text is too long for the cache."""
        if len(text) > _MAX_CHARACTERS:
            return None
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def get(self, key: bytes | None) -> Encoded | None:
        """Return the entry of a text, or None if the cache does not contain it."""
        with self._lock:
            if key is None or (entry := self._entries.get(key)) is None:
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return entry

    def put(self, key: bytes | None, encoded: Encoded) -> None:
        """Store the ids of a text, unless they would take more than an eighth of the cache."""
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
