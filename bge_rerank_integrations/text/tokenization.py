"""Texts to token ids: `<s> query </s></s> passage </s>`, cut on ids, with no state that a call changes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

# White space to every tokenizer in use, and to Python and Rust alike.
_WHITE_SPACE: Final = " \n\t\r\u3000"
# A text is first read as far as this many characters per token that can be kept ...
_CHARACTERS_PER_TOKEN: Final = 8
_EXTRA_CHARACTERS: Final = 1024
# ... then, where that gave too few tokens, further by this factor, and never beyond the last figure: a
# quarter of a second's and a few megabytes' worth, whatever the text.
_GROWTH: Final = 4
_MOST_CHARACTERS: Final = 1 << 18
# Inside an unbroken run a cut may change the tokens next to it, so that many are not relied on.
_UNRELIABLE_TOKENS: Final = 64
# To see that a text is not blank, so many of its characters and tokens are looked at.
_NUM_GLANCED_CHARACTERS: Final = 64
_NUM_GLANCED_TOKENS: Final = 16
# However long, white space between two words gives no token.
_LONG_GAP: Final = re.compile(f"[{_WHITE_SPACE}]{{256,}}")


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The ids of one (query, passage) pair.

    Attributes:
        windows: One int32 array a window, special tokens included; a single one unless the passage is
            long and the config asks for windows.
        truncated: Whether tokens of the passage were left out.
        query_truncated: Whether tokens of the query were left out.
    """

    windows: tuple[IntArray, ...]
    truncated: bool
    query_truncated: bool


class PairTokenizer:
    """Turns pairs of texts into ids; any number of threads may share one.

    The query is cut to `query_max_length` tokens and the passage to what is left of `max_length`: the
    id-level rule of FlagReranker (`prepare_for_model(..., truncation="only_second")` of transformers 4).
    With `query_truncation_side="left"` the query keeps its last tokens, and the instruction before them.
    Special tokens spelled out in a text are read as text.

    The texts of one call are spread over the cores, whichever thread it comes from: the Rust library has
    one pool of threads for all. In a child that was forked after its parent had tokenized anything, and
    where `TOKENIZERS_PARALLELISM=false` is set, it uses one core only.

    Args:
        path: A `tokenizer.json`.
        config: Lengths, instructions and what to do with long passages.
        cache: Where ids of passages are kept; it belongs to this tokenizer and config. None keeps none.
        default_prompt: The query instruction where the config has none.

    Raises:
        ConfigError: The query instruction alone fills `query_max_length`.
        CorruptCheckpointError: The file cannot be parsed.
        UnsupportedCheckpointError: Its pairs are not framed `<s> A </s></s> B </s>`.

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
        # What some tokenizers give for white space, which is nothing to read.
        self._space_ids = frozenset(space_ids)

    def is_blank(self, text: str) -> bool:
        """Return whether a text has nothing to read, for people or for the model.

        That is a text of white space, control and format characters, or one without tokens.
        """
        if any(map(str.isalnum, text[:_NUM_GLANCED_CHARACTERS])):
            return False  # what nearly all texts come to, without a look at the rest
        if is_blank(text):
            return True
        text = text.strip()
        ids, _ = self._encode_distinct([text], "", _NUM_GLANCED_TOKENS)[text]
        return self._space_ids.issuperset(ids.tolist())

    def encode(self, queries: Sequence[str], passages: Sequence[str]) -> list[EncodedPair]:
        """Encode the pairs `zip(queries, passages)`, each distinct text once.

        Args:
            queries: The query of each pair.
            passages: The passage of each pair, of equal number.

        Returns:
            One `EncodedPair` a pair, in order.
        """
        (encoded,) = self.stream(list(zip(queries, passages, strict=True)), max(len(queries), 1))
        return encoded

    def stream(self, pairs: Sequence[Pair], num_pairs: int) -> Iterator[list[EncodedPair]]:
        """Encode (query, passage) pairs and yield the results in lists of `num_pairs`, the last one shorter.

        Each list is encoded when it is asked for. A text that occurs in several lists is encoded once.
        """
        query_ids: dict[str, Encoded] = {}
        passage_ids: dict[str, Encoded] = {}
        for start in range(0, max(len(pairs), 1), num_pairs):
            part = pairs[start : start + num_pairs]
            new = [query for query, _ in part if query not in query_ids]
            query_ids |= self._encode_distinct(
                new, self._query_prefix, self._query_limit, keep_end=self._keeps_query_end
            )
            passage_ids |= self._encode_passages([text for _, text in part if text not in passage_ids])
            yield [self._pair(query_ids[query], passage_ids[passage]) for query, passage in part]

    def _pair(self, query: Encoded, passage: Encoded) -> EncodedPair:
        query_ids, query_cut = query
        passage_ids, passage_cut = passage
        room = self._max_length - NUM_SPECIAL_TOKENS - len(query_ids)
        starts = [0]
        if self._windows and len(passage_ids) > room:
            # The last window ends with the passage, so that it is as full as the others.
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
        """Map each distinct passage to its ids, those of recently seen ones from the cache."""
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
        """Map each distinct text to `limit` of its ids, and whether it has more.

        Args:
            texts: The texts.
            prefix: What stands before each.
            limit: Most ids to keep; None keeps all.
            keep_end: Keep the last ids instead of the first. Only for queries: it keeps their instruction.
        """
        encoded: dict[str, Encoded] = {}
        read = _tails if keep_end else _heads
        pending = {text: read(text, limit) for text in dict.fromkeys(texts)}
        while pending:  # hardly ever twice
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
            # A lone surrogate has no UTF-8 form; it is read as U+FFFD, as a decoder would have it.
            texts = [
                text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts
            ]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _heads(text: str, limit: int | None) -> Iterator[tuple[str, int, bool]]:
    """Yield beginnings of a text that may hold its first `limit` tokens, each longer than the last.

    Words are tokenized apart from each other, so a text cut before white space begins with the very
    tokens of the whole text; one token more than the limit then settles everything. Only where that
    gives too few is a cut made inside a word, and tokens near it are not relied on.

    Yields:
        (beginning, how many tokens it must give to be sure of the first `limit`, whether it is all).
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
    """Yield ends of a text that may hold its last `limit` tokens, as `_heads` yields beginnings."""
    for head, needed, is_whole in _heads(text[::-1], limit):
        # Tokens at the cut are never relied on: a mark that combines with the white space before it would
        # be read in another way without it.
        yield head[::-1], needed + _UNRELIABLE_TOKENS if needed else 0, is_whole


def _load(path: Path) -> tuple[Tokenizer, int]:
    """Load a tokenizer that cannot produce control ids from text, and the largest id it knows.

    Truncation and padding that a file has baked in are switched off. Two things turn `</s>` typed by a
    user into the control token: the list of added tokens, and the model's own vocabulary, which in
    XLM-R holds `</s>` as a piece. The first is emptied of special tokens, and in the second their
    pieces are renamed to what no text can contain after splitting at white space.
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
        raise CorruptCheckpointError(f"{path} is not a tokenizer file that can be read: {error}") from error
    return tokenizer, max_id


def _unreachable(token_id: int) -> str:
    return f" \n{token_id}"


def _frame(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of `<s>` and `</s>`, from how the tokenizer frames an empty pair."""
    ids = tokenizer.encode("", "").ids
    if len(ids) != NUM_SPECIAL_TOKENS or len(set(ids[1:])) != 1:
        raise UnsupportedCheckpointError(
            "the tokenizer does not frame pairs as <s> A </s></s> B </s>, so this is not an XLM-RoBERTa "
            "cross-encoder's tokenizer; use the tokenizer.json that belongs to the model"
        )
    return ids[0], ids[1]
