from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import PairTokenizer


def ids(length: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.arange(length, dtype=np.int32)


def test_a_stored_entry_is_found_and_read_only() -> None:
    cache = TokenCache(10_000)
    cache.put(cache.key("text"), (ids(3), True))
    found = cache.get(cache.key("text"))
    assert found is not None
    assert (found[0].tolist(), found[1]) == ([0, 1, 2], True)
    assert cache.get(cache.key("Text")) is None
    assert (cache.hits, cache.misses) == (1, 1)
    with pytest.raises(ValueError, match="read-only"):
        found[0][0] = 7


def test_least_recently_used_goes_first() -> None:
    cache = TokenCache(1100)  # room for ten entries
    for name in "abcdefghi":
        cache.put(cache.key(name), (ids(9), False))
    assert cache.get(cache.key("a")) is not None
    cache.put(cache.key("j"), (ids(9), False))
    cache.put(cache.key("k"), (ids(9), False))
    assert cache.get(cache.key("a")) is not None
    assert cache.get(cache.key("b")) is None
    assert cache.get(cache.key("k")) is not None


def test_an_entry_that_is_stored_again_takes_no_more_room() -> None:
    cache = TokenCache(1100)  # room for ten entries
    for name in "abcdefghij" * 2:
        cache.put(cache.key(name), (ids(9), False))
    assert all(cache.get(cache.key(name)) is not None for name in "abcdefghij")


def test_large_entries_and_long_texts_are_not_kept() -> None:
    cache = TokenCache(1000)
    cache.put(cache.key("large"), (ids(50), False))
    cache.put(cache.key("x" * 70_000), (ids(3), False))
    assert cache.get(cache.key("large")) is None
    assert cache.get(cache.key("x" * 70_000)) is None


def test_any_string_has_a_digest() -> None:
    cache = TokenCache(10_000)
    for text in ("", "\0", "\ud800", "熊猫"):
        cache.put(cache.key(text), (ids(2), False))
        assert cache.get(cache.key(text)) is not None


def test_the_cache_never_changes_results(checkpoint: Path, texts: list[str]) -> None:
    """Eight threads share a cache that is so small that it removes entries all the time."""
    path = checkpoint / "tokenizer.json"
    plain = PairTokenizer(path, ScorerConfig(max_length=128))
    cached = PairTokenizer(path, ScorerConfig(max_length=128), TokenCache(6000))
    expected = {text: plain.encode(["query"], [text])[0] for text in [*texts, texts[0] * 3]}

    def work(number: int) -> None:
        order = np.random.default_rng(number).permutation(list(expected))
        for text in [*order, *order[:5]]:
            (pair,) = cached.encode(["query"], [str(text)])
            assert pair.truncated == expected[str(text)].truncated
            assert pair.windows[0].tolist() == expected[str(text)].windows[0].tolist()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
