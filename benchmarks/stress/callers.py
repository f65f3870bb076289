"""Figures 1, 3, 14 and 15: a caller's results do not depend on other callers."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks.stress.common import MAX_DIFFERENCE, PATIENCE_S, Bench, Outcome, difference
from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, Scorer
from examples.random_checkpoint import build_random_checkpoint

T = TypeVar("T")
Call = tuple[str, str, list[str]]

MAX_GAP_S: Final = 0.05

# Large enough to keep the cores busy for several seconds.
MEDIUM_SHAPE: Final = {"num_layers": 6, "hidden_size": 384, "num_heads": 12, "intermediate_size": 1536}


# 1: results do not depend on other callers.


def concurrent_calls(bench: Bench) -> Outcome:
    """Check that 64 threads with mixed calls get the same scores as one thread."""
    calls = _make_calls(bench, 200)
    serial = [_make_call(bench.scorer, call) for call in calls]
    barrier = threading.Barrier(64)

    def work(thread: int) -> tuple[int, float]:
        rng = random.Random(thread)
        num_errors, worst = 0, 0.0
        barrier.wait(PATIENCE_S)
        for _ in range(bench.count(100)):
            at = rng.randrange(len(calls))
            try:
                worst = max(worst, difference(_make_call(bench.scorer, calls[at]), serial[at]))
            except Exception:
                num_errors += 1
        return num_errors, worst

    results = _in_threads(64, work)
    num_errors, worst = sum(errors for errors, _ in results), max(each for _, each in results)
    num_wrong, num_encoded = _concurrent_tokenizing(bench)
    return Outcome(
        num_errors == 0 and worst <= MAX_DIFFERENCE and num_wrong == 0,
        f"{64 * bench.count(100)} scoring calls: {num_errors} exceptions, off by at most {worst:.1e}; "
        f"{num_encoded} tokenizing calls: {num_wrong} wrong",
    )


def _make_calls(bench: Bench, count: int) -> list[Call]:
    rng = random.Random(0)
    ways = ["score", "rank", "rank_many", "compute_score", "arank"]
    return [
        (
            rng.choice(ways),
            rng.choice(bench.texts)[: rng.randrange(5, 80)],
            rng.sample(bench.texts, 1 + n % 9),
        )
        for n in range(count)
    ]


def _make_call(scorer: Scorer, call: Call) -> list[float]:
    way, query, passages = call
    pairs = [(query, passage) for passage in passages]
    if way == "score":
        return scorer.score(pairs)
    if way == "compute_score":
        return scorer.compute_score(pairs)
    if way == "rank":
        ranking = scorer.rank(query, passages)
    elif way == "rank_many":
        (ranking,) = scorer.rank_many([(query, passages)])
    else:
        ranking = asyncio.run(scorer.arank(query, passages))
    return [passage.score for passage in sorted(ranking, key=lambda passage: passage.index)]


def _concurrent_tokenizing(bench: Bench) -> tuple[int, int]:
    """Return the number of calls with other ids than in a single thread, and the number of all calls."""
    tokenizer = bench.tokenizer()
    rng = random.Random(1)
    texts = [*bench.texts, " ".join(bench.texts), *bench.phrases()]
    requests = [rng.sample(texts, rng.randrange(2, 12)) for _ in range(100)]

    def encode(texts: list[str]) -> list[tuple[bytes, bool]]:
        pairs = tokenizer.encode(texts[:1] * (len(texts) - 1), texts[1:])
        return [(pair.windows[0].tobytes(), pair.truncated) for pair in pairs]

    serial = [encode(request) for request in requests]
    num_calls = bench.count(10_000) // 8 + 1

    def work(thread: int) -> int:
        own = random.Random(thread)
        chosen = [own.randrange(len(requests)) for _ in range(num_calls)]
        return sum(encode(requests[at]) != serial[at] for at in chosen)

    return sum(_in_threads(8, work)), 8 * num_calls


# 3: the event loop.


def event_loop_gaps(bench: Bench) -> Outcome:
    """Check that the event loop keeps running while an adapter reranks."""
    passages = bench.passages(bench.count(256))
    documents = [Document(page_content=text) for text in passages]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in passages]
    medium = build_random_checkpoint(bench.folder / "medium", **MEDIUM_SHAPE)
    parts, p99s = [], []
    with Scorer(medium, device="cpu") as scorer:
        scorer.warmup()
        langchain, llama_index = BGEReranker(scorer=scorer), BGERerankPostprocessor(scorer=scorer)
        for name, rerank in (
            ("LangChain", lambda: langchain.acompress_documents(documents, "panda")),
            ("LlamaIndex", lambda: llama_index.apostprocess_nodes(nodes, query_str="panda")),
        ):
            seconds, gaps = asyncio.run(_gaps_during(rerank))
            p99s.append(_p99(gaps))
            parts.append(
                f"{name}: p99 {1000 * p99s[-1]:.1f} ms, max {1000 * max(gaps):.1f} in {seconds:.1f} s"
            )
    return Outcome(max(p99s) <= MAX_GAP_S, "; ".join(parts))


async def _gaps_during(work: Callable[[], Awaitable[object]]) -> tuple[float, list[float]]:
    """Return the seconds that some work took, and by how many seconds sleeps of 1 ms were late meanwhile."""
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - began - 0.001)

    ticker = asyncio.create_task(tick())
    began = time.perf_counter()
    await work()
    seconds = time.perf_counter() - began
    await asyncio.sleep(0.002)
    ticker.cancel()
    return seconds, gaps


# 14 and 15: adapters and arithmetic.


def shared_documents(bench: Bench) -> Outcome:
    """Check that documents are unchanged after eight threads reranked them through both adapters."""
    passages = bench.passages(bench.count(1000))
    documents = [Document(page_content=text, metadata={"at": n}) for n, text in enumerate(passages)]
    nodes = [
        NodeWithScore(node=TextNode(text=text, metadata={"at": n}), score=1.0 / (n + 1))
        for n, text in enumerate(passages)
    ]
    before = [document.model_dump_json() for document in documents] + [
        node.model_dump_json() for node in nodes
    ]

    def work(thread: int) -> tuple[list[object], list[object]]:
        keep = thread % 2 == 0
        langchain = BGEReranker(scorer=bench.scorer, keep_retrieval_score=keep)
        llama_index = BGERerankPostprocessor(scorer=bench.scorer, keep_retrieval_score=keep)
        query = f"what does animal {thread % 2} eat?"
        return (
            list(langchain.compress_documents(documents, query)),
            list(llama_index.postprocess_nodes(nodes, query_str=query)),
        )

    returned = _in_threads(8, work)
    after = [document.model_dump_json() for document in documents] + [
        node.model_dump_json() for node in nodes
    ]
    num_mutated = sum(a != b for a, b in zip(before, after, strict=True))
    originals = {id(each) for each in (*documents, *nodes)}
    num_same = sum(id(each) in originals for pair in returned for each in (*pair[0], *pair[1]))
    num_lost = sum(len(each) != len(passages) for pair in returned for each in pair)
    return Outcome(
        num_mutated == 0 and num_same == 0 and num_lost == 0,
        f"{len(passages)} documents, {len(passages)} nodes, 16 calls: {num_mutated} mutated, {num_same} "
        f"returned without a copy, {num_lost} results of the wrong length",
    )


def identical_pairs(bench: Bench) -> Outcome:
    """Check that a pair's score does not depend on its batch, and that equal batches give equal bits."""
    rng = random.Random(10)
    pair = ("what does a panda eat?", bench.texts[0])
    (alone,) = bench.scorer.score([pair])
    texts = bench.passages(500)
    worst, num_different = 0.0, 0
    num_batches = bench.count(100)
    for _ in range(num_batches):
        batch = [("query", text) for text in rng.sample(texts, rng.randrange(40))]
        at = rng.randrange(len(batch) + 1)
        batch.insert(at, pair)
        scores = bench.scorer.score(batch)
        worst = max(worst, abs(scores[at] - alone))
        num_different += scores != bench.scorer.score(batch)
    return Outcome(
        worst <= MAX_DIFFERENCE and num_different == 0,
        f"{num_batches} batches: off by at most {worst:.1e}, {num_different} not bit-identical when repeated",
    )


def _in_threads(num_threads: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, range(num_threads)))


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]
