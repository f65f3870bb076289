"""A LangChain `BaseCrossEncoder` with the scores of a reranker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from langchain_core.cross_encoders import BaseCrossEncoder

from bge_rerank_integrations.adapters.calls import rank_requests, rank_texts
from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.errors import ConfigError, InputError, NonFiniteScoreError
from bge_rerank_integrations.validation import check_pairs, check_query, check_requests

PairError = TypeVar("PairError", InputError, NonFiniteScoreError)


class CrossEncoderView(BaseCrossEncoder):
    """The scores of a reranker behind LangChain's interface for cross-encoders.

    Args:
        reranker: The reranker. Its `top_n` and `score_threshold` do not apply.
    """

    def __init__(self, reranker: RerankOptions) -> None:
        self._reranker = reranker

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return one float for each (query, passage) pair, in order."""
        pairs = check_pairs(text_pairs)
        groups: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            groups.setdefault(query, []).append(index)
        requests = [(query, [pairs[index][1] for index in indices]) for query, indices in groups.items()]
        order = [index for indices in groups.values() for index in indices]
        try:
            rankings = rank_requests(self._reranker, check_requests(requests), None, None)
        except NonFiniteScoreError as error:
            if error.index is None:
                raise
            raise _error_of_pair(error, order) from None
        except InputError as error:
            # The error names the query only. Rank that query alone, so that the error names the passage.
            query, texts = requests[error.index or 0]
            try:
                rank_texts(self._reranker, check_query(query), texts, None, None)
            except InputError as exact:
                raise _error_of_pair(exact, groups[query]) from None
            raise
        scores = {
            indices[passage.index]: float(passage.score)
            for indices, ranked in zip(groups.values(), rankings, strict=True)
            for passage in ranked
        }
        if len(scores) < len(pairs):
            raise ConfigError(
                f"the scorer {self._reranker.scorer_name()} returned no score for some passages"
            )
        return [scores[index] for index in range(len(pairs))]


def _error_of_pair(error: PairError, indices: Sequence[int]) -> PairError:
    """Return an error that names a pair, given an error that names a position in `indices`."""
    index = indices[error.index or 0]
    message = re.sub(r"\b(passage|pair) \d+\b", "the passage", str(error), count=1)
    return type(error)(f"pair {index}: {message}", index=index)
