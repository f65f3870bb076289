"""BM25, a first stage that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bge_rerank_integrations.errors import DatasetError, missing_extra
from bge_rerank_integrations.evaluation.datasets import Run

# Chinese and Japanese have no spaces between words, so each of their characters counts as a word.
_UNSPACED: Final = (
    "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD: Final = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}"


class Bm25:
    """BM25 with the defaults of bm25s, except for the words: stop words are kept.

    A word has at least two characters. In Chinese and Japanese, each character is a word.

    Args:
        corpus: Maps a passage id to its text.

    Raises:
        MissingExtraError: bm25s is not installed.
        DatasetError: The corpus contains no words.
    """

    def __init__(self, corpus: Mapping[str, str]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise missing_extra("eval", "bm25s") from error
        self._bm25s: Any = bm25s
        self._ids = list(corpus)
        self._retriever = bm25s.BM25()
        tokens = self._tokenize(list(corpus.values()))
        if not tokens.vocab:
            raise DatasetError("the corpus has no words that BM25 could index")
        self._retriever.index(tokens, show_progress=False)

    def search(self, queries: Mapping[str, str], depth: int) -> Run:
        """Return up to `depth` passages per query, best first. Each shares a word with the query."""
        if not queries:
            return {}
        found, scores = self._retriever.retrieve(
            self._tokenize(list(queries.values())), k=min(depth, len(self._ids)), show_progress=False
        )
        return {
            query_id: {
                self._ids[index]: score
                for index, score in zip(indices.tolist(), row.tolist(), strict=True)
                if score > 0
            }
            for query_id, indices, row in zip(queries, found, scores, strict=True)
        }

    def _tokenize(self, texts: list[str]) -> Any:
        return self._bm25s.tokenize(texts, stopwords=None, token_pattern=_WORD, show_progress=False)
