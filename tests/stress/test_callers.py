"""A caller's results do not depend on other callers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from bge_rerank_integrations import Scorer
from tests.stress.common import MAX_DIFFERENCE, PATIENCE_S, Bench, check, difference

T = TypeVar("T")
Call = tuple[str, str, list[str]]


@pytest.mark.stress
def test_64_threads_with_mixed_calls_get_the_scores_of_one(bench: Bench) -> None:
    calls = _make_calls(bench, 200)
    serial = [_make_call(bench.scorer, call) for call in calls]
    barrier = threading.Barrier(64)

    def work(thread: int) -> tuple[int, float]:
        rng = random.Random(thread)
        num_errors, worst = 0, 0.0
        barrier.wait(PATIENCE_S)
        for _ in range(100):
            at = rng.randrange(len(calls))
            try:
                worst = max(worst, difference(_make_call(bench.scorer, calls[at]), serial[at]))
            except Exception:
                num_errors += 1
        return num_errors, worst

    results = _in_threads(64, work)
    num_errors, worst = sum(errors for errors, _ in results), max(each for _, each in results)
    num_wrong, num_encoded = _concurrent_tokenizing(bench)
    check(
        num_errors == 0 and worst <= MAX_DIFFERENCE and num_wrong == 0,
        f"{64 * 100} scoring calls: {num_errors} exceptions, off by at most {worst:.1e}; "
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
    num_calls = 10_000 // 8 + 1

    def work(thread: int) -> int:
        own = random.Random(thread)
        chosen = [own.randrange(len(requests)) for _ in range(num_calls)]
        return sum(encode(requests[at]) != serial[at] for at in chosen)

    return sum(_in_threads(8, work)), 8 * num_calls


@pytest.mark.stress
def test_a_pair_scores_alike_in_any_batch_and_equal_batches_give_equal_bits(bench: Bench) -> None:
    rng = random.Random(10)
    pair = ("what does a panda eat?", bench.texts[0])
    (alone,) = bench.scorer.score([pair])
    texts = bench.passages(500)
    worst, num_different = 0.0, 0
    num_batches = 100
    for _ in range(num_batches):
        batch = [("query", text) for text in rng.sample(texts, rng.randrange(40))]
        at = rng.randrange(len(batch) + 1)
        batch.insert(at, pair)
        scores = bench.scorer.score(batch)
        worst = max(worst, abs(scores[at] - alone))
        num_different += scores != bench.scorer.score(batch)
    check(
        worst <= MAX_DIFFERENCE and num_different == 0,
        f"{num_batches} batches: off by at most {worst:.1e}, {num_different} not bit-identical when repeated",
    )


def _in_threads(num_threads: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, range(num_threads)))


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]
