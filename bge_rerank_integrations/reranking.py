"""Whole runs through a scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from tqdm import tqdm

from bge_rerank_integrations.datasets import Run
from bge_rerank_integrations.errors import DatasetError, InputError, NonFiniteScoreError
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.scorer import Scorer

# Enough to fill batches with pairs of like lengths; few enough that little waits to be encoded.
_NUM_PAIRS_AT_ONCE: Final = 1024


def rerank_run(
    scorer: Scorer,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    run: Run,
    *,
    progress: bool = False,
) -> Run:
    """Score every passage of a run, and return it best first.

    A passage with nothing to read comes last, as in `Scorer.rank`. Passages that the sigmoid rounds to the
    same score stay in the order of their logits.

    Args:
        scorer: The reranker.
        queries: Query id to text.
        corpus: Passage id to text.
        run: What to rerank.
        progress: Show a progress bar on stderr.

    Raises:
        DatasetError: The run names a query or a passage that there is not, or a query with nothing to read.
        RerankError: As `Scorer.rank_many` does.
    """
    for query_id, scores in run.items():
        if query_id not in queries:
            raise DatasetError(f"the run has a query that the queries lack: id {query_id!r}")
        missing = next((passage_id for passage_id in scores if passage_id not in corpus), None)
        if missing is not None:
            raise DatasetError(f"the run has a passage that the corpus lacks: id {missing!r}")
    reranked: Run = {query_id: {} for query_id in run}
    num_pairs = sum(map(len, run.values()))
    with tqdm(total=num_pairs, unit="pair", disable=not progress) as bar:
        for part in _parts(run):
            rankings = _rank(scorer, queries, corpus, part)
            for (query_id, passage_ids), ranking in zip(part, rankings, strict=True):
                reranked[query_id] = {passage_ids[passage.index]: passage.score for passage in ranking}
                bar.update(len(passage_ids))
    return reranked


_Part = list[tuple[str, list[str]]]


def _parts(run: Run) -> Iterator[_Part]:
    """Give query ids with their passages' ids, so many at a time that batches fill."""
    part: _Part = []
    num_pairs = 0
    for query_id, scores in run.items():
        if not scores:
            continue
        part.append((query_id, list(scores)))
        num_pairs += len(scores)
        if num_pairs >= _NUM_PAIRS_AT_ONCE:
            yield part
            part, num_pairs = [], 0
    if part:
        yield part


def _rank(
    scorer: Scorer, queries: Mapping[str, str], corpus: Mapping[str, str], part: _Part
) -> list[Ranking]:
    requests = [
        (queries[query_id], [corpus[passage_id] for passage_id in passage_ids])
        for query_id, passage_ids in part
    ]
    try:
        return scorer.rank_many(requests)
    except NonFiniteScoreError as error:
        pairs = [(query_id, passage_id) for query_id, passage_ids in part for passage_id in passage_ids]
        query_id, passage_id = pairs[error.index or 0]
        raise NonFiniteScoreError(
            f"the model's score of passage {passage_id!r} for query {query_id!r} is not finite"
        ) from None
    except InputError as error:
        query_id, _ = part[error.index or 0]
        raise DatasetError(f"the query with id {query_id!r} cannot be ranked: {error}") from None
