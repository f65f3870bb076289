"""Measures of ranking quality, and the change that reranking makes to them."""

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
_NAMES: Final = {"MRR@10": "RR@10", "MAP": "AP"}  # ir_measures names the measure of one query, not the mean


class Interval(NamedTuple):
    """A mean difference over queries and the limits of its 95 % confidence interval (paired bootstrap)."""

    mean: float
    low: float
    high: float


def measure(
    qrels: Mapping[str, Mapping[str, int]], run: Run, measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Measure a run with ir_measures, which uses trec_eval.

    Args:
        qrels: The judgements. Every query in them counts. A query that the run lacks counts as 0.
        run: The run. Passages with equal scores keep the run's order.
        measures: Names such as `nDCG@10`, `MRR@10`, `MAP` or `R@50`.

    Returns:
        Maps a measure to its values: query id to value.

    Raises:
        MissingExtraError: ir_measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise missing_extra("eval", "ir-measures") from error

    # `ir_measures.parse_measure` fails on Python 3.14: it uses `ast.Num`, which is gone.
    parsed: dict[Any, str] = {}
    for name in measures:
        base, _, cutoff = _NAMES.get(name, name).partition("@")
        measure = getattr(ir_measures, base)
        parsed[measure @ int(cutoff) if cutoff else measure] = name
    # trec_eval breaks ties by passage id. Ranks in place of scores keep the run's own order.
    strict = {
        query_id: {passage_id: -rank for rank, passage_id in enumerate(sorted_run(scores))}
        for query_id, scores in run.items()
        if scores
    }
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    # trec_eval treats passages with negative grades as not relevant, but pytrec_eval may crash on them.
    plain = {
        query_id: {passage_id: max(grade, 0) for passage_id, grade in judged.items()}
        for query_id, judged in qrels.items()
    }
    for metric in ir_measures.iter_calc(list(parsed), plain, strict):
        values[parsed[metric.measure]][metric.query_id] = float(metric.value)
    return values


def reranked_to_depth(first: Run, reranked: Run, depth: int) -> Run:
    """Return the run that results from reranking only the best `depth` passages of the first stage.

    The other passages follow below, in the first stage's order.

    Args:
        first: Run of the first stage.
        reranked: Reranker's run with the best `depth` passages of `first`. Passages with equal scores keep
            its order. Its other passages are ignored.
        depth: Number of passages per query that are reranked.
    """
    combined: Run = {}
    for query_id, scores in first.items():
        order = list(sorted_run(scores))
        kept = set(order[:depth])
        top = [passage_id for passage_id in sorted_run(reranked.get(query_id, {})) if passage_id in kept]
        combined[query_id] = {passage_id: -rank for rank, passage_id in enumerate(top + order[depth:])}
    return combined


def bootstrap(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Return the mean of `after - before` over queries and its 95 % interval. The result is deterministic."""
    differences = np.asarray(after) - np.asarray(before)
    rng = np.random.default_rng(0)
    means = [
        differences[rng.integers(len(differences), size=len(differences))].mean()
        for _ in range(_NUM_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of the model with another reranker over the same first stage.

    Attributes:
        name: Name of the other reranker.
        means: Maps a measure to the other reranker's mean over the queries.
        shares: Maps a measure to the model's mean divided by the other reranker's mean. None if the other
            reranker's mean is 0.
        intervals: Maps a measure to the mean difference and its 95 % interval. A positive difference means
            that the model is better.
    """

    name: str
    means: dict[str, float]
    shares: dict[str, float | None]
    intervals: dict[str, Interval]


class Change(NamedTuple):
    """The nDCG@10 of one query before and after reranking."""

    query_id: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """The quality of a first stage before and after reranking.

    Attributes:
        depth: Most passages per query that were reranked.
        before: Maps a measure to the first stage's mean over the queries.
        after: Maps a measure to the mean over the queries after reranking.
        intervals: Maps a measure to the mean change and its 95 % interval.
        changes: nDCG@10 of each query before and after reranking, in the order of the judgements.
        curve: Maps a number of reranked passages per query to the mean nDCG@10. 0 is the first stage.
        compared: Comparison with another reranker, or None if `evaluate` was given none.
        num_unanswered: Number of queries for which the first stage has no passage. They count as 0.
        num_pairs: Number of pairs scored.
        num_tokens: Number of tokens in these pairs.
        num_truncated: Number of pairs whose passage lost tokens because it was too long.
        num_truncated_queries: Number of queries that lost tokens because they were too long.
        seconds: Time that scoring took.
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
        """Return up to `count` queries that gained most, the largest gain first."""
        ordered = sorted(self.changes, key=lambda change: change.before - change.after)
        return [change for change in ordered[:count] if change.after > change.before]

    def hurt(self, count: int) -> list[Change]:
        """Return up to `count` queries that lost most, the largest loss first."""
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
    """Rerank the best passages of a first stage, and measure both rankings.

    Args:
        scorer: The reranker.
        dataset: Texts and judgements. Only queries with a relevant passage are evaluated.
        first: Run of the first stage.
        depth: Number of passages per query to rerank; the others of `first` follow below them. Recall is
            measured at this depth.
        compared: Name and run of another reranker. Passages of that run that are not reranked here are
            ignored.
        progress: Show a progress bar on stderr.

    Raises:
        DatasetError: The run contains no judged query, or a passage that is not in the corpus. Or the
            compared run lacks a query or a passage that is reranked.
        MissingExtraError: ir_measures is not installed.
    """
    queries = dataset.judged_queries()
    qrels = {query_id: dataset.qrels[query_id] for query_id in queries}
    whole = {query_id: sorted_run(first.get(query_id, {})) for query_id in queries}
    first = {query_id: dict(list(scores.items())[:depth]) for query_id, scores in whole.items()}
    num_unanswered = sum(not scores for scores in first.values())
    if num_unanswered == len(first):
        raise DatasetError("the run has no passage for any judged query; are its ids from another data set?")
    names = [*MEASURES, f"R@{min(10, depth)}", f"R@{depth}"]
    before = measure(qrels, whole, names)
    other = None
    if compared is not None:
        name, run = compared
        _check_compared(first, name, run)
        other = (name, measure(qrels, reranked_to_depth(whole, run, depth), names))
    started = time.perf_counter()
    reranked = rerank_run(scorer, queries, dataset.corpus, first, progress=progress)
    seconds = time.perf_counter() - started
    scores = reranked.run
    after = measure(qrels, reranked_to_depth(whole, scores, depth), names)
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
            cut: _mean(measure(qrels, reranked_to_depth(whole, scores, cut), [PER_QUERY])[PER_QUERY])
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


def _check_compared(first: Run, name: str, run: Run) -> None:
    """Raise `DatasetError` if a run lacks a query or a passage of the first stage."""
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
