"""Time contenders in turn, and verify that they compute the same scores."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.common import Pairs, reworded, spread
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, IdBatch
from benchmarks.peers.registry import BASELINE, is_ours
from benchmarks.workloads import Workload, WorkloadMaker
from bge_rerank_integrations import Scorer

MAX_FLOAT32_DIFFERENCE: Final = 1e-4
MIN_SCORE_STD: Final = 0.1
# This many pairs are enough to verify that contenders agree. A whole large workload would take minutes.
NUM_CHECKED: Final = 128
NUM_TUNED: Final = 64


@dataclass
class Run:
    """The timings of one contender on one workload.

    Attributes:
        key: Key of the contender.
        contender: The contender.
        workload: The workload.
        wall_s: Seconds per call, for each repeat.
        cpu_s: Seconds of processor time per call over all threads, for each repeat.
    """

    key: str
    contender: Contender
    workload: Workload
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the medians, and the throughput computed from them."""
        wall_s = statistics.median(self.wall_s)
        return {
            "key": self.key,
            "name": self.contender.name,
            "dtype": self.contender.dtype,
            "batch_size": self.contender.batch_size,
            "wall_s": wall_s,
            "cpu_s": statistics.median(self.cpu_s),
            "pairs_per_s": len(self.workload.pairs) / wall_s,
            "tokens_per_s": sum(self.workload.num_tokens) / wall_s,
            "wall_s_all": self.wall_s,
            "cpu_s_all": self.cpu_s,
        }


def interleave(runs: Sequence[Run], repeats: int) -> None:
    """Time runs in turn. Each repeat starts with a different run, so that drift affects all runs equally.

    In one repeat, all runs score the same texts. Each repeat has new texts, so that no cache of texts helps.
    """
    for repeat in range(repeats):
        texts = {run.workload.name: run.workload.texts(repeat) for run in runs}
        first = repeat % len(runs)
        for run in (*runs[first:], *runs[:first]):
            calls = texts[run.workload.name]
            cpu, wall = time.process_time(), time.perf_counter()
            for pairs in calls:
                run.contender.score(pairs)
            run.wall_s.append((time.perf_counter() - wall) / len(calls))
            run.cpu_s.append((time.process_time() - cpu) / len(calls))


def tune(contender: Contender, pairs: Pairs) -> None:
    """Try the batch sizes of a contender on some pairs, and keep the fastest.

    The warm-up scores as many pairs as the timed run. Some contenders compile a kernel for each new shape,
    and batches of one pair have the most shapes.
    """
    if not contender.batch_sizes:
        return
    some = spread(pairs, NUM_TUNED)
    seconds: dict[int, float] = {}
    for size in contender.batch_sizes:
        contender.batch_size = size
        contender.score(reworded(some, f"warm-up {size}"))
        began = time.perf_counter()
        contender.score(reworded(some, f"tune {size}"))
        seconds[size] = time.perf_counter() - began
    contender.batch_size = min(seconds, key=seconds.__getitem__)


# Agreement.


@dataclass(frozen=True)
class Reference:
    """Reference scores for some pairs of a workload.

    Attributes:
        pairs: The pairs.
        ids: Token ids of each pair from this package's tokenizer, int32 as bytes.
        logits: Logits from this package in float32.
    """

    pairs: Pairs
    ids: list[bytes]
    logits: list[float]


def reference(setup: Setup, maker: WorkloadMaker, workloads: Sequence[Workload]) -> dict[str, Reference]:
    """Score some pairs of each workload in float32. Return a reference for each workload's name."""
    references: dict[str, Reference] = {}
    with Scorer(setup.model, device=setup.device, dtype="float32") as scorer:
        for workload in workloads:
            pairs = spread(workload.pairs, NUM_CHECKED)
            references[workload.name] = Reference(pairs, maker.ids(pairs), scorer.score(pairs))
    return references


def check(contender: Contender, reference: Reference, padding_idx: int) -> dict[str, Any]:
    """Score the pairs of a reference without timing, and compare token ids and scores."""
    seen: set[bytes] = set()
    num_rows = 0

    def record(batch: IdBatch) -> None:
        nonlocal num_rows
        num_rows += batch.size
        seen.update(row[row != padding_idx].astype("int32").tobytes() for row in batch)

    if contender.watch is None:
        values = contender.score(reference.pairs)
        seen, num_rows = set(reference.ids), sum(map(len, reference.ids)) // 4
    else:
        with contender.watch(record):
            values = contender.score(reference.pairs)
    if contender.gives_order:
        difference = wrong_way(reference, values)
    else:
        difference = max(abs(a - b) for a, b in zip(values, reference.logits, strict=True))
    return {
        "same_ids": seen == set(reference.ids),
        "rows_per_token": num_rows / (sum(map(len, reference.ids)) // 4),
        "gives": "order" if contender.gives_order else "logits",
        "max_difference": difference,
    }


def wrong_way(reference: Reference, places: Sequence[float]) -> float:
    """Return by how much a ranking contradicts the reference.

    This is the largest amount by which a passage's reference score, after a sigmoid, exceeds that of a
    passage that is ranked above it. 0 means that the rankings agree.
    """
    by_query: dict[str, list[tuple[float, float]]] = {}
    for (query, _), place, logit in zip(reference.pairs, places, reference.logits, strict=True):
        by_query.setdefault(query, []).append((place, 1 / (1 + math.exp(-logit))))
    largest = 0.0
    for placed in by_query.values():
        lowest = math.inf
        for _, score in sorted(placed, reverse=True):
            largest = max(largest, score - lowest)
            lowest = min(lowest, score)
    return largest


def problems(results: Sequence[Mapping[str, Any]], reference: Reference) -> list[str]:
    """Return the reasons why these results cannot be compared, if any."""
    found = [
        f"{result['name']}, {result['dtype']}, read different token ids than this package"
        for result in results
        if not result["same_ids"]
    ]
    std = statistics.pstdev(reference.logits)
    if not std > MIN_SCORE_STD:
        found.append(f"scores hardly vary (std {std:.3g}), so their agreement is not meaningful")
    return found + [
        f"{result['name']}, {result['dtype']}, differs by {result['max_difference']:.2e}, more than "
        f"{MAX_FLOAT32_DIFFERENCE:.0e}"
        for result in results
        if result["dtype"] == "float32" and not result["max_difference"] <= MAX_FLOAT32_DIFFERENCE
    ]


def add_ratios(results: Sequence[dict[str, Any]]) -> None:
    """Add the speed of each contender relative to `CrossEncoder` at its defaults and to the fastest peer."""
    walls = {result["key"]: result["wall_s"] for result in results}
    theirs = [wall_s for key, wall_s in walls.items() if not is_ours(key)]
    for result in results:
        baseline = walls.get(BASELINE)
        result["times_cross_encoder"] = baseline / result["wall_s"] if baseline else None
        result["times_best_peer"] = min(theirs) / result["wall_s"] if theirs else None
