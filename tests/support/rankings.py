"""Compares the rankings of two precisions of the embedded model on a small judged collection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
from scipy.stats import kendalltau

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.config import EMBEDDED_MODEL
from bge_rerank_integrations.engine.checkpoint.locate import EMBEDDED_FOLDER
from bge_rerank_integrations.engine.runner import Runner
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import join_title
from bge_rerank_integrations.evaluation.measures import measure
from bge_rerank_integrations.text.pairs import PreparedPairs
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import PairTokenizer
from tests.support.engine import score_all

CORPUS: Final = Path(__file__).parents[2] / "examples" / "corpus.jsonl"
# A query, and the passages of the example corpus that answer it.
QUERIES: Final = {
    "what do giant pandas eat": ["giant-panda"],
    "library for tables of data in Python": ["pandas-library"],
    "which planet is closest to the sun": ["mercury-planet"],
    "metal that is liquid at room temperature": ["mercury-element"],
    "invasive snakes in the United States": ["burmese-python-florida"],
    "largest cat of the Americas": ["jaguar-cat"],
    "which river carries the most water": ["amazon-river"],
    "how do plants turn light into sugar": ["photosynthesis", "chlorophyll"],
    "how do cells get energy from glucose": ["cellular-respiration", "mitochondria"],
    "machine that lifts heavy loads": ["crane-machine"],
    "rocket that carried astronauts to the Moon": ["saturn-rocket", "apollo-11"],
    "tower in Paris built for a World's Fair": ["eiffel-tower"],
    "difference between TCP and UDP": ["tcp", "udp"],
    "model that reads a query and a passage together": ["cross-encoder"],
    "who discovered the first antibiotic": ["penicillin"],
    "why do prices rise": ["inflation", "central-bank"],
}
DEPTH: Final = 15


def check_rankings_agree(exact: Runner, rounded: Runner, min_tau: float, max_ndcg_difference: float) -> None:
    """Rerank BM25's best passages for each query with two runners of the embedded model, and compare them.

    Args:
        exact: The embedded model in float32.
        rounded: The embedded model in another precision.
        min_tau: Least mean of Kendall's tau-b between the two rankings of a query.
        max_ndcg_difference: Largest difference of the mean nDCG@10.
    """
    passages = read_english_passages()
    queries = {query: query for query in QUERIES}
    found = Bm25(passages).search(queries, DEPTH)
    pairs = [(query, passage_id) for query, scores in found.items() for passage_id in scores]
    assert len(pairs) > 0.9 * DEPTH * len(QUERIES), "BM25 finds too few passages for a ranking"
    tokenizer = PairTokenizer(
        EMBEDDED_FOLDER / "tokenizer.json", ScorerConfig(model=EMBEDDED_MODEL), TokenCache(1 << 20)
    )
    prepared = PreparedPairs([(query, [passages[passage_id]]) for query, passage_id in pairs])
    windows = [window for part in prepared.encode(tokenizer) for window in part]

    def rank(runner: Runner) -> dict[str, dict[str, float]]:
        scores = prepared.scores(score_all(runner, windows), normalize=False)
        run: dict[str, dict[str, float]] = {}
        for (query, passage_id), score in zip(pairs, scores, strict=True):
            run.setdefault(query, {})[passage_id] = score
        return run

    exact_run, rounded_run = rank(exact), rank(rounded)
    taus = [
        kendalltau(list(rounded_run[query].values()), list(scores.values())).statistic
        for query, scores in exact_run.items()
    ]
    exact_gain, rounded_gain = mean_ndcg(exact_run), mean_ndcg(rounded_run)
    print(f"Kendall's tau-b: mean {np.mean(taus):.4f}, least {min(taus):.4f}")
    print(f"nDCG@10: exact {exact_gain:.4f}, rounded {rounded_gain:.4f}")
    assert exact_gain > 0.9, "the model must rank well, or the comparison says nothing"
    assert np.mean(taus) >= min_tau
    assert abs(rounded_gain - exact_gain) <= max_ndcg_difference


def read_english_passages() -> dict[str, str]:
    """Return the English passages of the example corpus by id. The embedded model is English."""
    rows = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
    return {
        row["_id"]: join_title(row["title"], row["text"]) for row in rows if not row["_id"].startswith("zh-")
    }


def mean_ndcg(run: dict[str, dict[str, float]]) -> float:
    """Return the mean nDCG@10 of a run over `QUERIES`."""
    qrels = {query: dict.fromkeys(passage_ids, 1) for query, passage_ids in QUERIES.items()}
    return float(np.mean(list(measure(qrels, run, ["nDCG@10"])["nDCG@10"].values())))
