"""The API key of a server: its environment variable, and which strings can be a key."""

from __future__ import annotations

from typing import Final

API_KEY_VARIABLE: Final = "BGE_RERANK_API_KEY"


def is_api_key(key: str) -> bool:
    """Return whether an HTTP header can contain the key: printable ASCII without spaces."""
    return bool(key) and all("!" <= character <= "~" for character in key)
