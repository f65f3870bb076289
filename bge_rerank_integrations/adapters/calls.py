"""Calls of an adapter's scorer, which may be one of this package or one of the user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.adapters.results import check_ranking
from bge_rerank_integrations.errors import NonFiniteScoreError
from bge_rerank_integrations.protocols import PackageScorer
from bge_rerank_integrations.ranking import RankedPassage
from bge_rerank_integrations.validation import naming_request


def rank_texts(
    adapter: RerankOptions, query: str, texts: Sequence[str], top_n: int | None, threshold: float | None
) -> Sequence[RankedPassage]:
    """Rank texts with an adapter's scorer, `normalize` and `timeout`.

    Without texts, or with a `top_n` of 0, no model is loaded.
    """
    if not texts or top_n == 0:
        return []
    scorer = adapter.resolve_scorer()
    if isinstance(scorer, PackageScorer):
        return scorer.rank(
            query, texts, top_n, threshold, timeout=adapter.timeout, normalize=adapter.normalize
        )
    return check_ranking(scorer.rank(query, texts, top_n, threshold), len(texts), scorer)


async def arank_texts(
    adapter: RerankOptions, query: str, texts: Sequence[str], top_n: int | None, threshold: float | None
) -> Sequence[RankedPassage]:
    """Do the same as `rank_texts` without blocking the event loop."""
    if not texts or top_n == 0:
        return []
    scorer = await adapter.aresolve_scorer()
    if isinstance(scorer, PackageScorer):
        return await scorer.arank(
            query, texts, top_n, threshold, timeout=adapter.timeout, normalize=adapter.normalize
        )
    return check_ranking(await scorer.arank(query, texts, top_n, threshold), len(texts), scorer)


def rank_requests(
    adapter: RerankOptions,
    requests: Sequence[tuple[str, Sequence[str]]],
    top_n: int | None,
    threshold: float | None,
) -> Sequence[Sequence[RankedPassage]]:
    """Rank the texts of several queries, in one call if the scorer is one of this package.

    Raises:
        InputError: For the same reasons as `rank_texts`; `.index` says which request.
        NonFiniteScoreError: `.index` is the position among the texts of all requests.
    """
    if top_n == 0 or not any(texts for _, texts in requests):
        return [[] for _ in requests]
    scorer = adapter.resolve_scorer()
    if isinstance(scorer, PackageScorer):
        return scorer.rank_many(
            requests, top_n, threshold, timeout=adapter.timeout, normalize=adapter.normalize
        )
    rankings: list[Sequence[RankedPassage]] = []
    for number, (query, texts) in enumerate(requests):
        with _naming(requests, number):
            rankings.append(rank_texts(adapter, query, texts, top_n, threshold))
    return rankings


async def arank_requests(
    adapter: RerankOptions,
    requests: Sequence[tuple[str, Sequence[str]]],
    top_n: int | None,
    threshold: float | None,
) -> Sequence[Sequence[RankedPassage]]:
    """Do the same as `rank_requests` without blocking the event loop."""
    if top_n == 0 or not any(texts for _, texts in requests):
        return [[] for _ in requests]
    scorer = await adapter.aresolve_scorer()
    if isinstance(scorer, PackageScorer):
        return await scorer.arank_many(
            requests, top_n, threshold, timeout=adapter.timeout, normalize=adapter.normalize
        )
    rankings: list[Sequence[RankedPassage]] = []
    for number, (query, texts) in enumerate(requests):
        with _naming(requests, number):
            rankings.append(await arank_texts(adapter, query, texts, top_n, threshold))
    return rankings


@contextmanager
def _naming(requests: Sequence[tuple[str, Sequence[str]]], number: int) -> Iterator[None]:
    """Let an error in this block, which ranks one request, have the index that `Scorer.rank_many` gives."""
    with naming_request(number):
        try:
            yield
        except NonFiniteScoreError as error:
            if error.index is None:
                raise
            num_before = sum(len(texts) for _, texts in requests[:number])
            raise NonFiniteScoreError(str(error), index=num_before + error.index) from None
