"""Loads `tokenizer.json` so that special tokens that are spelled out in a text are read as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from bge_rerank_integrations.config import NUM_SPECIAL_TOKENS
from bge_rerank_integrations.errors import CorruptCheckpointError, UnsupportedCheckpointError
from bge_rerank_integrations.runtime.tracebacks import raise_if_of_signal_handler


class TokenizerFile(NamedTuple):
    """A tokenizer and its ids.

    Attributes:
        tokenizer: The tokenizer. It can put special tokens around a pair. It never reads part of a text as a
            special token.
        max_id: The largest id.
        reserved_ids: Ids of special tokens that it never gives for a text.
    """

    tokenizer: Tokenizer
    max_id: int
    reserved_ids: frozenset[int]


def load_tokenizer(path: Path) -> TokenizerFile:
    """Load a tokenizer that reads special tokens in a text as text.

    Truncation and padding settings of the file are switched off. There are two ways in which `</s>` in the
    text of a user can become the control token: the list of added tokens, and the vocabulary of the model, in
    which XLM-R has a piece `</s>`. Special tokens are therefore removed from the list. Their pieces in the
    vocabulary get names that no text contains after it has been split at white space.

    Args:
        path: Path of a `tokenizer.json`.

    Raises:
        CorruptCheckpointError: The file cannot be parsed.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        added = data.get("added_tokens") or []
        vocabulary = data["model"]["vocab"]
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        pieces = dict.fromkeys(special.values())
        if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
            max_id = len(vocabulary) - 1
            unknown_id = data["model"].get("unk_id")
            for token_id in pieces:
                if token_id <= max_id:
                    vocabulary[token_id][0] = _unreachable(token_id)
        else:  # WordPiece, WordLevel, BPE: piece -> id
            max_id = max(vocabulary.values())
            unknown = data["model"].get("unk_token")
            unknown_id = vocabulary.get(unknown)
            for content, token_id in special.items():
                if content != unknown and vocabulary.pop(content, None) is not None:
                    vocabulary[_unreachable(token_id)] = token_id
        max_id = max([max_id, *(token["id"] for token in added)])
        data["added_tokens"] = [token for token in added if not token.get("special")]
        data["truncation"] = data["padding"] = None
        tokenizer = Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    except Exception as error:  # the Rust library raises bare Exception
        raise_if_of_signal_handler(error)
        raise CorruptCheckpointError(f"{path} is not a valid tokenizer file: {error}") from error
    return TokenizerFile(tokenizer, max_id, frozenset(pieces) - {unknown_id})


def frame_of(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of `<s>` and `</s>`, taken from the tokenizer's encoding of an empty pair.

    Raises:
        UnsupportedCheckpointError: The tokenizer does not encode pairs as `<s> A </s></s> B </s>`.
    """
    ids = tokenizer.encode("", "").ids
    if len(ids) != NUM_SPECIAL_TOKENS or len(set(ids[1:])) != 1:
        raise UnsupportedCheckpointError(
            "the tokenizer does not frame pairs as <s> A </s></s> B </s>, so it does not belong to an "
            "XLM-RoBERTa cross-encoder; use the tokenizer.json of the model"
        )
    return ids[0], ids[1]


def _unreachable(token_id: int) -> str:
    return f" \n{token_id}"
