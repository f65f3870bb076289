"""How well a ranking puts the relevant passages first, and whether reranking changed that."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from bge_rerank_integrations.errors import DatasetError, missing_extra
from bge_rerank_integrations.evaluation.datasets import BeirDataset, Run, sorted_run
from bge_rerank_integrations.evaluation.runs import rerank_run
from bge_rerank_integrations.scorer import Scorer

MEASURES: Final = ("nDCG@10", "MRR@10", "MAP")
PER_QUERY: Final = "nDCG@10"

_NUM_RESAMPLES: Final = 10_000
_CURVE: Final = (2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000)
_NAMES: Final = {"MRR@10": "RR@10", "MAP": "AP"}  # ir_measures names what one query has, not the mean


class Interval(NamedTuple):
    """A mean difference and the 95 % interval that a paired bootstrap over the queries gives it."""

    mean: float
    low: float
    high: float


def measure(
    qrels: Mapping[str, Mapping[str, int]], run: Run, measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Measure a run through ir_measures (and so through trec_eval).

    Args:
        qrels: Judgements; every query in them counts, with 0 where the run has nothing for it.
        run: Scores; equal ones count in the run's order.
        measures: Such as `nDCG@10`, `MRR@10`, `MAP` or `R@50`.

    Returns:
        Measure to query id to value.

    Raises:
        MissingExtraError: ir_measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise missing_extra("eval", "ir-measures") from error

    # Not with ir_measures.parse_measure, which uses what Python 3.14 has removed.
    parsed: dict[Any, str] = {}
    for name in measures:
        base, _, cutoff = _NAMES.get(name, name).partition("@")
        measure = getattr(ir_measures, base)
        parsed[measure @ int(cutoff) if cutoff else measure] = name
    # trec_eval breaks ties by passage id; the order that was really given is what is to be measured.
    strict = {
        query_id: {passage_id: -rank for rank, passage_id in enumerate(sorted_run(scores))}
        for query_id, scores in run.items()
        if scores
    }
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    plain = {query_id: dict(judged) for query_id, judged in qrels.items()}
    for metric in ir_measures.iter_calc(list(parsed), plain, strict):
        values[parsed[metric.measure]][metric.query_id] = float(metric.value)
    return values


def reranked_to_depth(first: Run, reranked: Run, depth: int) -> Run:
    """Return the run in which only the first stage's best `depth` were reranked, above the rest.

    Args:
        first: What the first stage gave.
        reranked: The reranker's score of each passage of `first`; equal ones count in its order.
        depth: How many of each query are reranked.
    """
    combined: Run = {}
    for query_id, scores in first.items():
        order = list(sorted_run(scores))
        kept = set(order[:depth])
        top = [passage_id for passage_id in sorted_run(reranked[query_id]) if passage_id in kept]
        combined[query_id] = {passage_id: -rank for rank, passage_id in enumerate(top + order[depth:])}
    return combined


def bootstrap(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of `after - before` over queries, with its interval; the same for the same input."""
    differences = np.asarray(after) - np.asarray(before)
    rng = np.random.default_rng(seed)
    means = [
        differences[rng.integers(len(differences), size=len(differences))].mean()
        for _ in range(_NUM_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Another reranker over the same first stage, and how the model stands to it.

    Attributes:
        name: What it is called.
        means: Measure to its mean over the queries.
        shares: Measure to what part of its mean the model reaches; None where that mean is 0.
        intervals: Measure to the mean difference, the model's value less the other's, and its 95 % interval.
    """

    name: str
    means: dict[str, float]
    shares: dict[str, float | None]
    intervals: dict[str, Interval]


class Change(NamedTuple):
    """What reranking did to one query, in nDCG@10."""

    query_id: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """The quality of a first stage before and after reranking.

    Attributes:
        depth: How many passages of each query were reranked, at most.
        before: Measure to mean over the queries, of the first stage.
        after: The same, reranked.
        intervals: Measure to the mean difference and its 95 % interval.
        changes: nDCG@10 of each query, in the order of the judgements.
        curve: Number of passages reranked to mean nDCG@10; 0 is the first stage.
        compared: What `evaluate` was given to compare with; None where it was given nothing.
        num_unanswered: Queries that the first stage has nothing for; they count as 0.
        num_pairs: Pairs scored.
        num_tokens: Their tokens.
        num_truncated: Of the pairs, how many have a passage that lost tokens because it was too long.
        num_truncated_queries: Queries that lost tokens.
        seconds: What scoring them took.
    """

    depth: int
    before: dict[str, float]
    after: dict[str, float]
    intervals: dict[str, Interval]
    changes: list[Change]
    curve: dict[int, float]
    compared: Comparison | None
    num_unanswered: int
    num_pairs: int
    num_tokens: int
    num_truncated: int
    num_truncated_queries: int
    seconds: float

    def helped(self, count: int) -> list[Change]:
        """Return the queries that gained most."""
        ordered = sorted(self.changes, key=lambda change: change.before - change.after)
        return [change for change in ordered[:count] if change.after > change.before]

    def hurt(self, count: int) -> list[Change]:
        """Return the queries that lost most."""
        ordered = sorted(self.changes, key=lambda change: change.after - change.before)
        return [change for change in ordered[:count] if change.after < change.before]


def evaluate(
    scorer: Scorer,
    dataset: BeirDataset,
    first: Run,
    depth: int,
    *,
    compared: tuple[str, Run] | None = None,
    progress: bool,
) -> Report:
    """Rerank a first stage's best passages and compare.

    Args:
        scorer: The reranker.
        dataset: Texts and judgements; only queries with a relevant passage count.
        first: The first stage's run.
        depth: How many passages of each query to rerank; recall is measured at this depth.
        compared: Name and run of another reranker. What it ranked beyond the passages that are reranked
            here does not count.
        progress: Show a progress bar on stderr.

    Raises:
        DatasetError: The run has nothing for any query that is judged, or a passage that the corpus lacks;
            or the compared run lacks a query or a passage that is reranked.
        MissingExtraError: ir_measures is not installed.
    """
    queries = dataset.judged_queries()
    qrels = {query_id: dataset.qrels[query_id] for query_id in queries}
    first = {query_id: dict(list(first.get(query_id, {}).items())[:depth]) for query_id in queries}
    num_unanswered = sum(not scores for scores in first.values())
    if num_unanswered == len(first):
        raise DatasetError(
            "the run has no passage for any query that is judged; are the ids of one data set?"
        )
    names = [*MEASURES, f"R@{min(10, depth)}", f"R@{depth}"]
    before = measure(qrels, first, names)
    other = None if compared is None else (compared[0], measure(qrels, _cut_to(first, *compared), names))
    started = time.perf_counter()
    reranked = rerank_run(scorer, queries, dataset.corpus, first, progress=progress)
    seconds = time.perf_counter() - started
    scores = reranked.run
    after = measure(qrels, scores, names)
    return Report(
        depth=depth,
        before={name: _mean(values) for name, values in before.items()},
        after={name: _mean(values) for name, values in after.items()},
        intervals=_intervals(before, after),
        changes=[
            Change(query_id, value, after[PER_QUERY][query_id])
            for query_id, value in before[PER_QUERY].items()
        ],
        curve={
            cut: _mean(measure(qrels, reranked_to_depth(first, scores, cut), [PER_QUERY])[PER_QUERY])
            for cut in sorted({0, *(cut for cut in _CURVE if cut < depth), depth})
        },
        compared=None if other is None else _compare(*other, after),
        num_unanswered=num_unanswered,
        num_pairs=reranked.num_pairs,
        num_tokens=reranked.num_tokens,
        num_truncated=reranked.num_truncated,
        num_truncated_queries=reranked.num_truncated_queries,
        seconds=seconds,
    )


def _cut_to(first: Run, name: str, run: Run) -> Run:
    """Return of a run what the first stage has, in the run's order."""
    for query_id, scores in first.items():
        ranked = run.get(query_id, {})
        if scores and not ranked:
            raise DatasetError(f"the compared run {name!r} lacks a query of the first stage: id {query_id!r}")
        missing = next((passage_id for passage_id in scores if passage_id not in ranked), None)
        if missing is not None:
            raise DatasetError(
                f"the compared run {name!r} lacks a passage of the first stage: id {missing!r}, for query "
                f"{query_id!r}"
            )
    return {
        query_id: {
            passage_id: score for passage_id, score in run.get(query_id, {}).items() if passage_id in scores
        }
        for query_id, scores in first.items()
    }


def _compare(
    name: str, others: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> Comparison:
    means = {measured: _mean(values) for measured, values in others.items()}
    return Comparison(
        name=name,
        means=means,
        shares={
            measured: _mean(after[measured]) / mean if mean > 0 else None for measured, mean in means.items()
        },
        intervals=_intervals(others, after),
    )


def _intervals(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> dict[str, Interval]:
    return {
        name: bootstrap(list(values.values()), list(after[name].values())) for name, values in before.items()
    }


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))
