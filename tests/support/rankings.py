"""How near the rankings of two precisions are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine.runner import Runner
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import read_beir
from bge_rerank_integrations.evaluation.measures import measure
from bge_rerank_integrations.text.pairs import PreparedPairs
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import PairTokenizer


def kendall_tau(ours: list[float], theirs: list[float]) -> float:
    agreements = [
        np.sign(ours[i] - ours[j]) * np.sign(theirs[i] - theirs[j])
        for i, j in combinations(range(len(ours)), 2)
    ]
    return float(np.mean(agreements))


def check_on_cranfield(
    assets: Path, make_exact: Callable[[Path], Runner], make_coarse: Callable[[Path], Runner]
) -> None:
    """Compare rankings of BM25's best 20 for a tenth of the queries."""
    folder = assets / "xlmr-cross-encoder"
    dataset = read_beir(assets / "retrieval" / "cranfield")
    queries = {query_id: dataset.queries[query_id] for query_id in sorted(dataset.judged_queries())[::10]}
    found = Bm25(dataset.corpus).search(queries, 20)
    pairs = [(query_id, passage_id) for query_id, scores in found.items() for passage_id in scores]
    tokenizer = PairTokenizer(folder / "tokenizer.json", ScorerConfig(model=str(folder)), TokenCache(1 << 20))
    prepared = PreparedPairs(
        [(queries[query_id], dataset.corpus[passage_id]) for query_id, passage_id in pairs]
    )
    windows = [window for part in prepared.encode(tokenizer, len(pairs)) for window in part]

    def rank(runner: Runner) -> dict[str, dict[str, float]]:
        results = prepared.results(runner.run(windows), normalize=False)
        run: dict[str, dict[str, float]] = {}
        for (query_id, passage_id), result in zip(pairs, results, strict=True):
            run.setdefault(query_id, {})[passage_id] = result.score
        return run

    def gain(run: dict[str, dict[str, float]]) -> float:
        judged = {query_id: dataset.qrels[query_id] for query_id in queries}
        return float(np.mean(list(measure(judged, run, ["nDCG@10"])["nDCG@10"].values())))

    exact, coarse = rank(make_exact(folder)), rank(make_coarse(folder))
    taus = [
        kendall_tau(list(coarse[query_id].values()), list(exact[query_id].values())) for query_id in exact
    ]
    print(f"Kendall's tau: mean {np.mean(taus):.4f}, least {min(taus):.4f}")
    print(f"nDCG@10: float32 {gain(exact):.4f}, float8 {gain(coarse):.4f}")
    assert np.mean(taus) >= 0.975
    assert abs(gain(coarse) - gain(exact)) <= 0.005
