"""Contenders that callers of the same process share."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

from benchmarks.models import Setup
from benchmarks.serving.loads import NUM_LONG, Contender, Request
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.text.pairs import PreparedPairs

NUM_LONE: Final = 200


def load_scorer(setup: Setup, stack: ExitStack) -> Contender:
    """Load `Scorer.rank`, called by threads."""
    scorer = _scorer(setup, stack)
    return Contender("Scorer.rank, threads", lambda request: _in_order(scorer.rank(*request)))


def load_scorer_async(setup: Setup, stack: ExitStack) -> Contender:
    """Load `Scorer.arank`, awaited by tasks."""
    scorer = _scorer(setup, stack)

    async def ask(request: Request) -> list[float]:
        return _in_order(await scorer.arank(*request))

    return Contender("Scorer.arank, asyncio", ask, is_async=True)


def load_lock(setup: Setup, _: ExitStack) -> Contender:
    """Load `CrossEncoder` of sentence-transformers, with a lock around each call."""
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(setup.plain), device=setup.device)
    lock = threading.Lock()

    def ask(request: Request) -> list[float]:
        query, passages = request
        with lock:
            return list(map(float, encoder.predict([(query, passage) for passage in passages])))

    return Contender("CrossEncoder behind a lock, threads", ask)


def load_llama_index(setup: Setup, _: ExitStack) -> Contender:
    """Load `SentenceTransformerRerank` of LlamaIndex, each call in a thread of its own."""
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode

    reranker = SentenceTransformerRerank(
        model=str(setup.plain), top_n=NUM_LONG, device=setup.device, trust_remote_code=False
    )

    def rerank(request: Request) -> list[float]:
        query, passages = request
        nodes = [NodeWithScore(node=TextNode(text=passage)) for passage in passages]
        reranker.postprocess_nodes(list(nodes), query_str=query)
        return [float(node.score or 0.0) for node in nodes]  # it sets the scores of the nodes it was given

    async def ask(request: Request) -> list[float]:
        return await asyncio.to_thread(rerank, request)

    return Contender("SentenceTransformerRerank, to_thread", ask, is_async=True)


def queue_overhead(setup: Setup) -> dict[str, float]:
    """Time one short pair through a scorer and directly through its parts, in turn. Return microseconds."""
    query, passage = "what is a panda?", "The giant panda is a bear."
    with ExitStack() as stack:
        scorer = _scorer(setup, stack)
        pipeline = scorer._require_pipeline()

        def direct() -> float:
            prepared = PreparedPairs([(query, [passage])])
            (windows,) = prepared.encode(pipeline.tokenizer)
            pending = pipeline.runners[0].launch(windows)
            assert pending is not None
            return prepared.scores(pending.wait(), normalize=True)[0]

        medians = medians_in_turn(
            {"scorer_us": lambda: scorer.score([(query, passage)]), "direct_us": direct}, NUM_LONE
        )
    medians = {name: 1e6 * seconds for name, seconds in medians.items()}
    return {**medians, "overhead_us": medians["scorer_us"] - medians["direct_us"]}


def medians_in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Run several calls in turn, and return the median seconds of each."""
    num_untimed = max(repeats // 10, 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + num_untimed):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[num_untimed:]) for name, each in times.items()}


def _scorer(setup: Setup, stack: ExitStack) -> Scorer:
    scorer = Scorer(setup.model, device=setup.device, dtype="float32", normalize=True)
    return stack.enter_context(scorer)


def _in_order(ranking: Sequence[Any]) -> list[float]:
    return [passage.score for passage in sorted(ranking, key=lambda passage: passage.index)]
