"""Reranking whole runs with a scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tqdm import tqdm

from bge_rerank_integrations.errors import DatasetError, InputError, NonFiniteScoreError
from bge_rerank_integrations.evaluation.datasets import Run
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.validation import reason_of

# Large enough to fill batches with pairs of similar length, small enough that the device rarely waits for
# tokenization.
_NUM_PAIRS_AT_ONCE: Final = 1024


@dataclass(frozen=True, kw_only=True)
class Reranked:
    """A reranked run and counts of the work done.

    Attributes:
        run: The reranked run, with the passages of each query best first.
        num_pairs: Number of pairs scored.
        num_tokens: Number of tokens in these pairs.
        num_truncated: Number of pairs whose passage lost tokens because it was too long.
        num_truncated_queries: Number of queries that lost tokens because they were too long.
    """

    run: Run
    num_pairs: int
    num_tokens: int
    num_truncated: int
    num_truncated_queries: int


def rerank_run(
    scorer: Scorer,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    run: Run,
    *,
    progress: bool = False,
) -> Reranked:
    """Score every passage of a run.

    Args:
        scorer: The reranker.
        queries: Maps a query id to its text.
        corpus: Maps a passage id to its text.
        run: The run to rerank.
        progress: Show a progress bar on stderr.

    Raises:
        DatasetError: The run contains a query or a passage that `queries` or `corpus` lacks, or the scorer
            rejects a query.
        RerankError: `Scorer.rank_many` raises it.
    """
    for query_id, scores in run.items():
        if query_id not in queries:
            raise DatasetError(f"the run has a query that the queries lack: id {query_id!r}")
        missing = next((passage_id for passage_id in scores if passage_id not in corpus), None)
        if missing is not None:
            raise DatasetError(f"the run has a passage that the corpus lacks: id {missing!r}")
    # A query without a passage needs no scores, and it may be blank.
    reranked: Run = {query_id: {} for query_id in run}
    num_pairs = num_tokens = num_truncated = num_truncated_queries = 0
    with tqdm(total=sum(map(len, run.values())), unit="pair", disable=not progress) as bar:
        for part in _parts(run):
            requests = [
                (queries[query_id], [corpus[passage_id] for passage_id in run[query_id]]) for query_id in part
            ]
            try:
                rankings = scorer.rank_many(requests)
            except NonFiniteScoreError as error:
                keys = [(query_id, passage_id) for query_id in part for passage_id in run[query_id]]
                query_id, passage_id = keys[error.index or 0]
                raise NonFiniteScoreError(
                    f"the model's score of passage {passage_id!r} for query {query_id!r} is not finite"
                ) from None
            except InputError as error:
                if error.index is None:
                    raise
                raise DatasetError(
                    f"query {part[error.index]!r} cannot be reranked: {reason_of(error)}"
                ) from None
            for query_id, ranking in zip(part, rankings, strict=True):
                passage_ids = list(run[query_id])
                reranked[query_id] = {passage_ids[passage.index]: passage.score for passage in ranking}
                num_pairs += ranking.num_pairs
                num_tokens += ranking.num_tokens
                num_truncated += ranking.num_truncated
                num_truncated_queries += ranking.num_truncated_queries
                bar.update(len(passage_ids))
    return Reranked(
        run=reranked,
        num_pairs=num_pairs,
        num_tokens=num_tokens,
        num_truncated=num_truncated,
        num_truncated_queries=num_truncated_queries,
    )


def _parts(run: Run) -> Iterator[list[str]]:
    """Yield lists of ids of queries with passages. A list has enough passages to fill batches well."""
    part: list[str] = []
    num_pairs = 0
    for query_id, scores in run.items():
        if not scores:
            continue
        part.append(query_id)
        num_pairs += len(scores)
        if num_pairs >= _NUM_PAIRS_AT_ONCE:
            yield part
            part, num_pairs = [], 0
    if part:
        yield part
