"""Whole runs through a scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tqdm import tqdm

from bge_rerank_integrations.datasets import Run, sorted_run
from bge_rerank_integrations.errors import DatasetError, NonFiniteScoreError
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

    Args:
        scorer: The reranker.
        queries: Query id to text.
        corpus: Passage id to text.
        run: What to rerank.
        progress: Show a progress bar on stderr.

    Raises:
        DatasetError: The run names a query or a passage that there is not.
        RerankError: As `Scorer.score` does.
    """
    for query_id, scores in run.items():
        if query_id not in queries:
            raise DatasetError(f"the run has a query that the queries lack: id {query_id!r}")
        missing = next((passage_id for passage_id in scores if passage_id not in corpus), None)
        if missing is not None:
            raise DatasetError(f"the run has a passage that the corpus lacks: id {missing!r}")
    reranked: Run = {query_id: {} for query_id in run}
    keys = [(query_id, passage_id) for query_id, scores in run.items() for passage_id in scores]
    with tqdm(total=len(keys), unit="pair", disable=not progress) as bar:
        for start in range(0, len(keys), _NUM_PAIRS_AT_ONCE):
            part = keys[start : start + _NUM_PAIRS_AT_ONCE]
            try:
                logits = scorer.score(
                    [(queries[query_id], corpus[passage_id]) for query_id, passage_id in part]
                )
            except NonFiniteScoreError as error:
                query_id, passage_id = part[error.index or 0]
                raise NonFiniteScoreError(
                    f"the model's score of passage {passage_id!r} for query {query_id!r} is not finite",
                    index=start + (error.index or 0),
                ) from None
            for (query_id, passage_id), logit in zip(part, logits, strict=True):
                reranked[query_id][passage_id] = logit
            bar.update(len(part))
    return {query_id: sorted_run(scores) for query_id, scores in reranked.items()}
