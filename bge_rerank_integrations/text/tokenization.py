"""Converts pairs of texts to token ids: `<s> query </s></s> passage </s>`, truncated on token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from bge_rerank_integrations.config import NUM_SPECIAL_TOKENS, ScorerConfig
from bge_rerank_integrations.errors import ConfigError
from bge_rerank_integrations.text.distinct_texts import DistinctTexts
from bge_rerank_integrations.text.token_cache import Encoded, TokenCache
from bge_rerank_integrations.text.tokenizer_file import frame_of, load_tokenizer
from bge_rerank_integrations.validation import Pair, is_blank

IntArray = npt.NDArray[np.int32]

# Number of characters and tokens that are checked to see that a text is not blank.
_NUM_GLANCED_CHARACTERS: Final = 64
_NUM_GLANCED_TOKENS: Final = 16


class EncodedPair(NamedTuple):
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
        self._tokenizer, self.max_id, self._reserved_ids = load_tokenizer(path)
        begin, end = frame_of(self._tokenizer)
        self._frame_ids = {begin, end}
        self._begin = np.array([begin], dtype=np.int32)
        self._end = np.array([end], dtype=np.int32)
        self._between = np.array([end, end], dtype=np.int32)
        self._query_prefix = default_prompt if config.query_instruction is None else config.query_instruction
        self._passage_prefix = config.passage_instruction or ""
        self._max_length = config.max_length
        self._query_limit = config.effective_query_max_length
        self._windows = config.long_passages == "windows"
        self._overlap = config.window_overlap_tokens
        query_prefix_ids, space_ids = (each.ids for each in self._encodings([self._query_prefix, " "]))
        if len(query_prefix_ids) >= self._query_limit:
            raise ConfigError(
                f"the query instruction has {len(query_prefix_ids)} tokens, which leaves no room for a query "
                f"in query_max_length {self._query_limit}; raise query_max_length"
            )
        self._kept_prefix_ids = query_prefix_ids if config.query_truncation_side == "left" else None
        # Some tokenizers give tokens for white space. These ids do not make a text readable.
        self._space_ids = frozenset(space_ids)

    def may_give(self, token_id: int) -> bool:
        """Return whether a pair can contain a token."""
        return token_id in self._frame_ids or not (token_id > self.max_id or token_id in self._reserved_ids)

    def is_blank(self, text: str) -> bool:
        """Return whether a text is blank, for people or for the model.

        Such a text consists of white space, control characters and format characters, or it gives no tokens.
        """
        if any(map(str.isalnum, text[:_NUM_GLANCED_CHARACTERS])):
            return False  # fast path: true of nearly all texts
        if is_blank(text):
            return True
        text = text.strip()
        glanced = DistinctTexts([text], "", _NUM_GLANCED_TOKENS)
        self._tokenize(glanced)
        ids, _ = glanced.encoded[text]
        return self._space_ids.issuperset(ids.tolist())

    def encode(self, queries: Sequence[str], passages: Sequence[str]) -> list[EncodedPair]:
        """Encode the pairs `zip(queries, passages)`. Each distinct text is tokenized once.

        Args:
            queries: The query of each pair.
            passages: The passage of each pair. There must be as many passages as queries.

        Returns:
            One `EncodedPair` for each pair, in order.
        """
        (encoded,) = self.stream(list(zip(queries, passages, strict=True)), [len(queries)])
        return encoded

    def stream(self, pairs: Sequence[Pair], part_sizes: Sequence[int]) -> Iterator[list[EncodedPair]]:
        """Encode (query, passage) pairs in parts, and yield a list for each part.

        Each part is encoded when it is asked for. A text that occurs in several parts is encoded once.

        Args:
            pairs: The pairs.
            part_sizes: Number of pairs in each part, at least one part. The sum is the number of pairs.
        """
        assert sum(part_sizes) == len(pairs)
        known = _Known({}, {})
        for size, end in zip(part_sizes, accumulate(part_sizes), strict=True):
            part = pairs[end - size : end]
            self._encode_texts(part, known)
            yield [self._pair(known.queries[query], known.passages[passage]) for query, passage in part]

    def _encode_texts(self, pairs: Sequence[Pair], known: _Known) -> None:
        """Encode the texts of pairs that are not known yet. Passages may come from the cache."""
        new_queries = (query for query, _ in pairs if query not in known.queries)
        queries = DistinctTexts(new_queries, self._query_prefix, self._query_limit, self._kept_prefix_ids)
        keys: dict[str, bytes | None] = {}
        for passage in dict.fromkeys(text for _, text in pairs if text not in known.passages):
            key, found = self._look_up(passage)
            if found is None:
                keys[passage] = key
            else:
                known.passages[passage] = found
        limit = None if self._windows else self._max_length - NUM_SPECIAL_TOKENS
        passages = DistinctTexts(keys, self._passage_prefix, limit)
        self._tokenize(queries, passages)
        for query, (ids, is_cut) in queries.encoded.items():
            known.queries[query] = np.concatenate((self._begin, ids, self._between)), is_cut
        known.passages.update(passages.encoded)
        if self._cache is not None:
            for passage, encoded in passages.encoded.items():
                self._cache.put(keys[passage], encoded)

    def _look_up(self, passage: str) -> tuple[bytes | None, Encoded | None]:
        """Return the key of a passage in the cache, and its entry if there is one."""
        if self._cache is None:
            return None, None
        key = self._cache.key(passage)
        return key, self._cache.get(key)

    def _tokenize(self, *groups: DistinctTexts) -> None:
        """Tokenize all texts of the groups. One call of the library tokenizes as many of them as possible."""
        while strings := [string for group in groups for string in group.strings()]:
            all_ids = (encoding.ids for encoding in self._encodings(strings))
            for group in groups:
                group.take(all_ids)

    def _pair(self, query: Encoded, passage: Encoded) -> EncodedPair:
        framed_query, query_cut = query
        passage_ids, passage_cut = passage
        room = self._max_length - len(framed_query) - len(self._end)
        if not self._windows or len(passage_ids) <= room:
            window = np.concatenate((framed_query, passage_ids[:room], self._end))
            lost_tail = passage_cut or len(passage_ids) > room
            return EncodedPair((window,), truncated=lost_tail, query_truncated=query_cut)
        # The last window ends at the end of the passage, so that it is as long as the others.
        starts = [*range(0, len(passage_ids) - room, room - self._overlap), len(passage_ids) - room]
        windows = tuple(
            np.concatenate((framed_query, passage_ids[start : start + room], self._end)) for start in starts
        )
        return EncodedPair(windows, truncated=passage_cut, query_truncated=query_cut)

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            # A lone surrogate cannot be encoded as UTF-8. Replace it by U+FFFD, as decoders do.
            texts = [
                text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts
            ]
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)


class _Known(NamedTuple):
    """The ids of all texts that a call has encoded so far.

    Attributes:
        queries: The ids of queries, with `<s>` before and `</s></s>` after them.
        passages: The ids of passages.
    """

    queries: dict[str, Encoded]
    passages: dict[str, Encoded]
