"""`fidelity`: compare the rankings of faster precisions with float32's, on whole sets of queries."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import kendalltau

from benchmarks import report
from benchmarks.common import Pairs, quiet
from benchmarks.models import chosen_model
from benchmarks.peers.registry import REFERENCE, load, load_all
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import BeirDataset, Run, read_beir
from bge_rerank_integrations.evaluation.measures import measure

MEASURE: Final = "nDCG@10"
DEFAULT_CONTENDERS: Final = ["ours", "onnx-int8", "openvino-int8"]


@dataclass(frozen=True)
class Candidates:
    """The passages that BM25 found for the queries of a data set.

    Attributes:
        name: Name of the data set.
        dataset: Texts and judgements.
        first: BM25's run at the largest depth.
    """

    name: str
    dataset: BeirDataset
    first: Run

    def pairs(self) -> Pairs:
        """Return the pairs to score, grouped by query, with BM25's best passages first."""
        return [
            (self.dataset.queries[query_id], self.dataset.corpus[passage_id])
            for query_id, scores in self.first.items()
            for passage_id in scores
        ]

    def run(self, values: Sequence[float], depth: int) -> Run:
        """Return a run over BM25's best `depth` passages, from scores in the order of `pairs`."""
        left = iter(values)
        scored = {
            query_id: dict(zip(scores, [next(left) for _ in scores], strict=True))
            for query_id, scores in self.first.items()
        }
        return {query_id: dict(list(scores.items())[:depth]) for query_id, scores in scored.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument("--beir", type=Path, nargs="+", required=True, help="BEIR folders")
    parser.add_argument(
        "--depth", type=int, nargs="+", default=[20, 50], help="passages per query; default: 20 50"
    )
    parser.add_argument("--every", type=int, default=1, help="use only every N-th query; default: 1")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.model is None:
        parser.error("fidelity needs --model, because rankings by random weights mean nothing")
    if min(args.depth) < 2 or args.every < 1:
        parser.error("--depth must be at least 2 and --every at least 1")
    args.depth = sorted(set(args.depth))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    sets = [read_candidates(folder, max(args.depth), args.every) for folder in args.beir]
    with ExitStack() as stack:
        with quiet():
            setup = stack.enter_context(chosen_model(args))
            setup = setup.calibrated_with([pair for each in sets for pair in each.pairs()])
        document = report.begin(args, "depth", "every")
        with quiet():
            reference = load(REFERENCE, setup, stack)
            contenders, missing = load_all([key for key in args.contenders if key != REFERENCE], setup, stack)
        document["sets"] = []
        for candidates in sets:
            with quiet():
                pairs = candidates.pairs()
                exact = reference.score(pairs)
                values = {key: contender.score(pairs) for key, contender in contenders.items()}
            results = [
                judge(candidates, depth, exact, values, {key: each.dtype for key, each in contenders.items()})
                for depth in args.depth
            ]
            _print(candidates, results)
            document["sets"].append(
                {
                    "name": candidates.name,
                    "num_queries": len(candidates.first),
                    "num_pairs": len(pairs),
                    "depths": results,
                }
            )
    return report.end(document, missing=missing, problems=[])


def read_candidates(folder: Path, depth: int, every: int) -> Candidates:
    """Return BM25's best passages for every N-th judged query of a BEIR folder."""
    dataset = read_beir(folder)
    queries = dict(list(dataset.judged_queries().items())[::every])
    return Candidates(folder.resolve().name, dataset, Bm25(dataset.corpus).search(queries, depth))


def judge(
    candidates: Candidates,
    depth: int,
    exact: Sequence[float],
    values: Mapping[str, Sequence[float]],
    dtypes: Mapping[str, str],
) -> dict[str, Any]:
    """Compare the scores of contenders with those of float32 at one depth.

    Args:
        candidates: The pairs that were scored.
        depth: Number of BM25's passages per query to use.
        exact: Scores in float32.
        values: Maps a contender's key to its scores.
        dtypes: Maps a contender's key to its precision.
    """
    qrels = {query_id: candidates.dataset.qrels[query_id] for query_id in candidates.first}
    truth = candidates.run(exact, depth)
    results = []
    for key, scores in values.items():
        theirs = candidates.run(scores, depth)
        taus = [
            float(kendalltau(list(truth[query_id].values()), list(theirs[query_id].values())).statistic)
            for query_id in truth
            if len(truth[query_id]) > 1
        ]
        # The tau-b of a query is NaN if either ranking consists of ties only.
        defined = [tau for tau in taus if not math.isnan(tau)]
        results.append(
            {
                "key": key,
                "dtype": dtypes[key],
                "tau_b": float(np.mean(defined)) if defined else None,
                "min_tau_b": min(defined, default=None),
                "num_queries": len(defined),
                MEASURE: _mean(measure(qrels, theirs, [MEASURE])[MEASURE]),
            }
        )
    return {
        "depth": depth,
        "bm25": _mean(measure(qrels, candidates.run(_descending(exact), depth), [MEASURE])[MEASURE]),
        "float32": _mean(measure(qrels, truth, [MEASURE])[MEASURE]),
        "results": results,
    }


def _descending(values: Sequence[float]) -> list[float]:
    return [-float(place) for place in range(len(values))]


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _print(candidates: Candidates, results: Sequence[Mapping[str, Any]]) -> None:
    print(f"{candidates.name}: {len(candidates.first)} queries, nDCG@10 and mean tau-b against float32")
    columns = [f"{what}, {each['depth']}" for each in results for what in ("tau-b", MEASURE)]
    rows = [
        ("BM25", [cell for each in results for cell in ("", f"{each['bm25']:.4f}")]),
        (REFERENCE, [cell for each in results for cell in ("1", f"{each['float32']:.4f}")]),
    ]
    for index, result in enumerate(results[0]["results"]):
        cells = []
        for each in results:
            found = each["results"][index]
            cells += [report.figure(found["tau_b"], ".4f"), f"{found[MEASURE]:.4f}"]
        rows.append((result["key"], cells))
    report.print_table("", columns, rows, width=13)
