"""Converts pairs of texts to token ids: `<s> query </s></s> passage </s>`, truncated on token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from bge_rerank_integrations.config import NUM_SPECIAL_TOKENS, ScorerConfig
from bge_rerank_integrations.errors import (
    ConfigError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from bge_rerank_integrations.text.token_cache import Encoded, TokenCache
from bge_rerank_integrations.validation import Pair, is_blank

IntArray = npt.NDArray[np.int32]

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
# Number of characters and tokens that are checked to see that a text is not blank.
_NUM_GLANCED_CHARACTERS: Final = 64
_NUM_GLANCED_TOKENS: Final = 16
# White space between two words gives no token, whatever its length.
_LONG_GAP: Final = re.compile(f"[{_WHITE_SPACE}]{{256,}}")


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The token ids of a (query, passage) pair.

    Attributes:
        windows: An int32 array [length] for each window, special tokens included. There is one window, unless
            the passage is long and `long_passages` is "windows".
        truncated: Whether the passage lost tokens.
        query_truncated: Whether the query lost tokens.
    """

    windows: tuple[IntArray, ...]
    truncated: bool
    query_truncated: bool


class PairTokenizer:
    """Converts pairs of texts to token ids. Any number of threads can share one tokenizer.

    The query is truncated to `query_max_length` tokens, and the passage to the tokens that remain within
    `max_length`. This is the rule of FlagReranker, which calls `prepare_for_model(...,
    truncation="only_second")` of transformers 4. With `query_truncation_side="left"`, the query keeps its
    instruction and its last tokens. A special token that is spelled out in a text is read as text.

    The texts of a call are tokenized in parallel on all cores, by a thread pool of the Rust library. The
    library uses one core only if `TOKENIZERS_PARALLELISM=false` is set, or if this process was forked from a
    process that had tokenized a text.

    Args:
        path: Path of a `tokenizer.json`.
        config: The settings for lengths, instructions and long passages.
        cache: Cache for the ids of passages. It must not be used with another tokenizer or config. None
            disables caching.
        default_prompt: The query instruction if the config has none.

    Raises:
        ConfigError: The query instruction alone fills `query_max_length`.
        CorruptCheckpointError: The file cannot be parsed.
        UnsupportedCheckpointError: The tokenizer does not encode pairs as `<s> A </s></s> B </s>`.

    Example:
        >>> tokenizer = PairTokenizer(Path("bge-reranker-base/tokenizer.json"), ScorerConfig())
        >>> tokenizer.encode(["what is a panda?"], ["A bear."])[0].windows[0]
        array([0, 2367, 83, 10, 6, 85407, 32, 2, 2, 62, 81148, 5, 2], dtype=int32)
    """

    def __init__(
        self,
        path: Path,
        config: ScorerConfig,
        cache: TokenCache | None = None,
        *,
        default_prompt: str = "",
    ) -> None:
        self._cache = cache
        self._tokenizer, self.max_id = _load(path)
        begin, end = _frame(self._tokenizer)
        self._begin = np.array([begin], dtype=np.int32)
        self._end = np.array([end], dtype=np.int32)
        self._between = np.array([end, end], dtype=np.int32)
        self._query_prefix = default_prompt if config.query_instruction is None else config.query_instruction
        self._passage_prefix = config.passage_instruction or ""
        self._max_length = config.max_length
        self._query_limit = config.effective_query_max_length
        self._keeps_query_end = config.query_truncation_side == "left"
        self._windows = config.long_passages == "windows"
        self._overlap = config.window_overlap_tokens
        query_prefix_ids, space_ids = self._ids([self._query_prefix, " "])
        if len(query_prefix_ids) >= self._query_limit:
            raise ConfigError(
                f"the query instruction has {len(query_prefix_ids)} tokens, which leaves no room for a query "
                f"in query_max_length {self._query_limit}; raise query_max_length"
            )
        self._query_prefix_ids = query_prefix_ids
        # Some tokenizers give tokens for white space. These ids do not make a text readable.
        self._space_ids = frozenset(space_ids)

    def is_blank(self, text: str) -> bool:
        """Return whether a text has nothing to read, for people or for the model.

        Such a text consists of white space, control characters and format characters, or it gives no tokens.
        """
        if any(map(str.isalnum, text[:_NUM_GLANCED_CHARACTERS])):
            return False  # fast path: true of nearly all texts
        if is_blank(text):
            return True
        text = text.strip()
        ids, _ = self._encode_distinct([text], "", _NUM_GLANCED_TOKENS)[text]
        return self._space_ids.issuperset(ids.tolist())

    def encode(self, queries: Sequence[str], passages: Sequence[str]) -> list[EncodedPair]:
        """Encode the pairs `zip(queries, passages)`. Each distinct text is tokenized once.

        Args:
            queries: The query of each pair.
            passages: The passage of each pair. There must be as many passages as queries.

        Returns:
            One `EncodedPair` for each pair, in order.
        """
        (encoded,) = self.stream(list(zip(queries, passages, strict=True)), repeat(len(queries)))
        return encoded

    def stream(self, pairs: Sequence[Pair], part_sizes: Iterator[int]) -> Iterator[list[EncodedPair]]:
        """Encode (query, passage) pairs in parts, and yield a list for each part. There is at least one part.

        Each part is encoded when it is asked for. A text that occurs in several parts is encoded once.

        Args:
            pairs: The pairs.
            part_sizes: Number of pairs in each part. The last part may be shorter.
        """
        query_ids: dict[str, Encoded] = {}
        passage_ids: dict[str, Encoded] = {}
        start = 0
        for size in part_sizes:
            part = pairs[start : start + size]
            start += size
            new = [query for query, _ in part if query not in query_ids]
            query_ids |= self._encode_distinct(
                new, self._query_prefix, self._query_limit, keep_end=self._keeps_query_end
            )
            passage_ids |= self._encode_passages([text for _, text in part if text not in passage_ids])
            yield [self._pair(query_ids[query], passage_ids[passage]) for query, passage in part]
            if start >= len(pairs):
                return

    def _pair(self, query: Encoded, passage: Encoded) -> EncodedPair:
        query_ids, query_cut = query
        passage_ids, passage_cut = passage
        room = self._max_length - NUM_SPECIAL_TOKENS - len(query_ids)
        starts = [0]
        if self._windows and len(passage_ids) > room:
            # The last window ends at the end of the passage, so that it is as long as the others.
            starts = [*range(0, len(passage_ids) - room, room - self._overlap), len(passage_ids) - room]
        windows = tuple(
            np.concatenate(
                (self._begin, query_ids, self._between, passage_ids[start : start + room], self._end)
            )
            for start in starts
        )
        lost_tail = not self._windows and len(passage_ids) > room
        return EncodedPair(windows, truncated=passage_cut or lost_tail, query_truncated=query_cut)

    def _encode_passages(self, texts: Sequence[str]) -> dict[str, Encoded]:
        """Return the ids of each distinct passage, from the cache if it contains the passage."""
        limit = None if self._windows else self._max_length - NUM_SPECIAL_TOKENS
        if self._cache is None:
            return self._encode_distinct(texts, self._passage_prefix, limit)
        keys = {text: self._cache.key(text) for text in dict.fromkeys(texts)}
        found = {text: self._cache.get(key) for text, key in keys.items()}
        known = {text: encoded for text, encoded in found.items() if encoded is not None}
        new = self._encode_distinct([text for text in keys if text not in known], self._passage_prefix, limit)
        for text, encoded in new.items():
            self._cache.put(keys[text], encoded)
        return known | new

    def _encode_distinct(
        self, texts: Sequence[str], prefix: str, limit: int | None, *, keep_end: bool = False
    ) -> dict[str, Encoded]:
        """Return the first `limit` ids of each distinct text, and whether the text has more.

        Args:
            texts: The texts.
            prefix: Text that is put in front of each text.
            limit: Maximum number of ids to keep. None keeps all.
            keep_end: Whether to keep the query instruction and the last ids instead of the first ids. This
                works for queries only.
        """
        encoded: dict[str, Encoded] = {}
        read = _tails if keep_end else _heads
        pending = {text: read(text, limit) for text in dict.fromkeys(texts)}
        while pending:  # nearly always one round
            parts = {text: next(text_parts) for text, text_parts in pending.items()}
            all_ids = self._ids([prefix + part for part, _, _ in parts.values()])
            for (text, (_, needed, is_whole)), ids in zip(parts.items(), all_ids, strict=True):
                if len(ids) >= needed:
                    has_more = limit is not None and (len(ids) > limit or not is_whole)
                    kept = self._instruction_and_end(ids) if keep_end else ids[:limit]
                    encoded[text] = np.array(kept, dtype=np.int32), has_more
                    del pending[text]
        return encoded

    def _instruction_and_end(self, ids: list[int]) -> list[int]:
        if len(ids) <= self._query_limit:
            return ids
        return [*self._query_prefix_ids, *ids[len(self._query_prefix_ids) - self._query_limit :]]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            # A lone surrogate cannot be encoded as UTF-8. Replace it by U+FFFD, as decoders do.
            texts = [
                text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts
            ]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _heads(text: str, limit: int | None) -> Iterator[tuple[str, int, bool]]:
    """Yield longer and longer beginnings of a text, until one is sure to contain its first `limit` tokens.

    Words are tokenized independently. If a text is cut before white space, the tokens of the beginning are
    therefore also the first tokens of the whole text. One token more than the limit then suffices. If such a
    beginning gives too few tokens, the text is cut inside a word, and the tokens near the cut are discarded.

    Yields:
        The beginning, the number of tokens that it must give, and whether it is the whole text.
    """
    if limit is None:
        yield text, 0, True
        return
    first_end = end = _CHARACTERS_PER_TOKEN * limit + _EXTRA_CHARACTERS
    most = max(_MOST_CHARACTERS, first_end)
    while end < min(len(text), most):
        white_space = max(text.rfind(character, 0, end) for character in _WHITE_SPACE)
        if white_space > 0:
            yield text[:white_space], limit + 1, False
        yield text[:end], limit + _UNRELIABLE_TOKENS, False
        if end == first_end:
            text = _LONG_GAP.sub(" ", text)
        end *= _GROWTH
    yield text[:most], 0, len(text) <= most


def _tails(text: str, limit: int | None) -> Iterator[tuple[str, int, bool]]:
    """Yield longer and longer ends of a text, like `_heads` for the last `limit` tokens."""
    for head, needed, is_whole in _heads(text[::-1], limit):
        # The tokens at the cut are always discarded. Without the white space before it, a combining mark at
        # the cut would give other tokens.
        yield head[::-1], needed + _UNRELIABLE_TOKENS if needed else 0, is_whole


def _load(path: Path) -> tuple[Tokenizer, int]:
    """Load a tokenizer that reads special tokens in a text as text. Return it with its largest id.

    Truncation and padding settings of the file are switched off. There are two ways in which `</s>` in the
    text of a user can become the control token: the list of added tokens, and the vocabulary of the model, in
    which XLM-R has a piece `</s>`. Special tokens are therefore removed from the list. Their pieces in the
    vocabulary get names that no text contains after it has been split at white space.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        added = data.get("added_tokens") or []
        vocabulary = data["model"]["vocab"]
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        pieces = dict.fromkeys(special.values())
        if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
            max_id = len(vocabulary) - 1
            for token_id in pieces:
                if token_id <= max_id:
                    vocabulary[token_id][0] = _unreachable(token_id)
        else:  # WordPiece, WordLevel, BPE: piece -> id
            max_id = max(vocabulary.values())
            unknown = data["model"].get("unk_token")
            for content, token_id in special.items():
                if content != unknown and vocabulary.pop(content, None) is not None:
                    vocabulary[_unreachable(token_id)] = token_id
        max_id = max([max_id, *(token["id"] for token in added)])
        data["added_tokens"] = [token for token in added if not token.get("special")]
        data["truncation"] = data["padding"] = None
        tokenizer = Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    except Exception as error:  # the Rust library raises bare Exception
        raise CorruptCheckpointError(f"{path} is not a valid tokenizer file: {error}") from error
    return tokenizer, max_id


def _unreachable(token_id: int) -> str:
    return f" \n{token_id}"


def _frame(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of `<s>` and `</s>`, taken from the tokenizer's encoding of an empty pair."""
    ids = tokenizer.encode("", "").ids
    if len(ids) != NUM_SPECIAL_TOKENS or len(set(ids[1:])) != 1:
        raise UnsupportedCheckpointError(
            "the tokenizer does not frame pairs as <s> A </s></s> B </s>, so it does not belong to an "
            "XLM-RoBERTa cross-encoder; use the tokenizer.json of the model"
        )
    return ids[0], ids[1]
