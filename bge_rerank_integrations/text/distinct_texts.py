"""Decides how many characters of a long text to tokenize: enough for the tokens that are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from bge_rerank_integrations.text.token_cache import Encoded

# White space for every supported tokenizer, for Python and for Rust.
_WHITE_SPACE: Final = " \n\t\r\u3000"
# First, only this many characters of a text are tokenized for each token that can be kept.
_CHARACTERS_PER_TOKEN: Final = 8
_EXTRA_CHARACTERS: Final = 1024
# If they give too few tokens, this factor extends the part that is tokenized, up to a maximum. The maximum
# limits the work for one text to a quarter of a second and a few megabytes.
_GROWTH: Final = 4
_MOST_CHARACTERS: Final = 1 << 18
# A cut inside a word may change the tokens near the cut. This many tokens are therefore discarded.
_UNRELIABLE_TOKENS: Final = 64
# White space between two words gives no token, whatever its length.
_LONG_GAP: Final = re.compile(f"[{_WHITE_SPACE}]{{256,}}")


class Cut(NamedTuple):
    """A part of a text.

    Attributes:
        text: The part.
        num_tokens_needed: Number of tokens that it must give. With fewer, a longer part is tokenized.
        is_whole: Whether it is the whole text.
    """

    text: str
    num_tokens_needed: int
    is_whole: bool


class DistinctTexts:
    """Distinct texts, and the token ids that are kept of each.

    The caller tokenizes the strings of `strings` and gives their ids to `take`, until `strings` is empty.
    Nearly always one round is enough.

    Args:
        texts: The texts. Each distinct text counts once.
        prefix: Text that is put in front of each text.
        limit: Maximum number of ids to keep. None keeps all.
        end_prefix_ids: The ids of the prefix. If they are given, these and the last ids of a text are kept.
            None keeps the first ids.

    Attributes:
        encoded: The kept ids of each text, and whether the text has more ids.
    """

    def __init__(
        self,
        texts: Iterable[str],
        prefix: str,
        limit: int | None,
        end_prefix_ids: Sequence[int] | None = None,
    ) -> None:
        self.encoded: dict[str, Encoded] = {}
        self._prefix = prefix
        self._limit = limit
        self._end_prefix_ids = end_prefix_ids
        read = _heads if end_prefix_ids is None else _tails
        self._readers = {text: read(text, limit) for text in dict.fromkeys(texts)}
        self._reads = {text: next(reader) for text, reader in self._readers.items()}

    def strings(self) -> list[str]:
        """Return the string to tokenize for each text whose ids are not known yet."""
        # The prefix may be of a subclass of str, whose methods `+` would call.
        return ["".join((self._prefix, cut.text)) for cut in self._reads.values()]

    def take(self, all_ids: Iterator[list[int]]) -> None:
        """Take the ids of each string of `strings`, in order. Other ids stay in the iterator."""
        limit = self._limit
        short: list[str] = []
        # `zip` reads the texts first. After the last text, it therefore takes no ids from the iterator.
        for (text, cut), ids in zip(self._reads.items(), all_ids, strict=False):
            if len(ids) < cut.num_tokens_needed:
                short.append(text)
                continue
            has_more = limit is not None and (len(ids) > limit or not cut.is_whole)
            self.encoded[text] = np.array(self._kept(ids), dtype=np.int32), has_more
        self._reads = {text: next(self._readers[text]) for text in short}

    def _kept(self, ids: list[int]) -> list[int]:
        if self._limit is None or len(ids) <= self._limit:
            return ids
        if self._end_prefix_ids is None:
            return ids[: self._limit]
        return [*self._end_prefix_ids, *ids[len(self._end_prefix_ids) - self._limit :]]


def _heads(text: str, limit: int | None) -> Iterator[Cut]:
    """Yield longer and longer beginnings of a text, until one is sure to contain its first `limit` tokens.

    Words are tokenized independently. If a text is cut before white space, the tokens of the beginning are
    therefore also the first tokens of the whole text. One token more than the limit then suffices. If such a
    beginning gives too few tokens, the text is cut inside a word, and the tokens near the cut are discarded.
    In a word of thousands of characters that repeats one pattern, the cut may change the first tokens too.
    """
    if limit is None:
        yield Cut(text, 0, is_whole=True)
        return
    first_end = end = _CHARACTERS_PER_TOKEN * limit + _EXTRA_CHARACTERS
    most = max(_MOST_CHARACTERS, first_end)
    while end < min(len(text), most):
        white_space = max(text.rfind(character, 0, end) for character in _WHITE_SPACE)
        if white_space > 0:
            yield Cut(text[:white_space], limit + 1, is_whole=False)
        yield Cut(text[:end], limit + _UNRELIABLE_TOKENS, is_whole=False)
        if end == first_end:
            text = _LONG_GAP.sub(" ", text)
        end *= _GROWTH
    yield Cut(text[:most], 0, is_whole=len(text) <= most)


def _tails(text: str, limit: int | None) -> Iterator[Cut]:
    """Yield longer and longer ends of a text, like `_heads` for the last `limit` tokens."""
    for head in _heads(text[::-1], limit):
        # The tokens at the cut are always discarded. Without the white space before it, a combining mark at
        # the cut would give other tokens.
        needed = head.num_tokens_needed + _UNRELIABLE_TOKENS if head.num_tokens_needed else 0
        yield Cut(head.text[::-1], needed, head.is_whole)
