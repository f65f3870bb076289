"""What a second actor brings, what one actor costs, and whether time and memory grow with the rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.common import Pairs
from benchmarks.models import Setup
from benchmarks.ray_common import ROWS_PER_BLOCK, PeakSharedMemory, local_cluster, make_pairs
from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.ray import ActorOptions
from bge_rerank_integrations.ray.actors import map_with_scorer
from bge_rerank_integrations.ray.rows import score_rows

# Goals for an idle machine with more than two cores, since Ray itself needs some of their time.
_MIN_SPEEDUP: Final = 1.8
_MAX_COST: Final = 0.10
_MAX_NONLINEARITY: Final = 0.10
_SHARE_OF_SMALL_JOB: Final = 0.1


def measure_speed(setup: Setup, num_rows: int, seed: int, problems: list[str]) -> dict[str, Any]:
    """Score the same rows with plain scorers and actors, one and two of each, of one thread each.

    The time of a job is from the first block that an actor begins to the last one that ends. It excludes the
    start of Ray and the loading of the model. Two plain scorers in two processes show how much the machine
    itself gains from a second core.

    Args:
        setup: The model.
        num_rows: Number of rows.
        seed: Seed of the rows.
        problems: Receives the goals that are missed.

    Returns:
        The figures to print.
    """
    pairs = make_pairs(setup, num_rows, seed)
    config = ScorerConfig(model=setup.model, device=setup.device, dtype="float32", num_threads=1)
    plain_s, two_plain_s = (_score_plainly(pairs, config, num_processes) for num_processes in (1, 2))
    small = pairs[: max(int(num_rows * _SHARE_OF_SMALL_JOB), 1)]
    before_mib = _peak_mib()
    with local_cluster(), PeakSharedMemory() as shared:
        one_s = _score(pairs, config, num_actors=1)
        small_s = _score(small, config, num_actors=1)
        two_s = _score(pairs, config, num_actors=2)
    speedup, cost = one_s / two_s, one_s / plain_s - 1
    nonlinearity = abs(one_s / len(pairs) / (small_s / len(small)) - 1)
    for name, is_missed in (
        (f"two actors are {speedup:.2f} times as fast as one", speedup < _MIN_SPEEDUP),
        (f"one actor costs {cost:.0%} over a plain scorer", cost > _MAX_COST),
        (f"time differs by {nonlinearity:.0%} from linear", nonlinearity > _MAX_NONLINEARITY),
    ):
        if is_missed:
            problems.append(f"speed: {name}")
    return {
        "rows": len(pairs),
        "plain scorer, rows/s": round(len(pairs) / plain_s),
        "two plain scorers, rows/s": round(len(pairs) / two_plain_s),
        "one actor, rows/s": round(len(pairs) / one_s),
        f"one actor, {len(small)} rows, rows/s": round(len(small) / small_s),
        "two actors, rows/s": round(len(pairs) / two_s),
        "speedup of two actors": round(speedup, 2),
        "speedup of two plain scorers": round(plain_s / two_plain_s, 2),
        "cost of one actor": f"{cost:.1%}",
        "driver, peak MiB, and growth in the jobs": f"{_peak_mib():.0f}, {_peak_mib() - before_mib:.0f}",
        "shared memory, peak MiB": round(shared.peak_mib),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _score_plainly(pairs: Pairs, config: ScorerConfig, num_processes: int) -> float:
    """Return the seconds that scorers in processes of their own take to score equal parts of the rows."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, spawn.Pool(num_processes) as pool:
        ready = manager.Barrier(num_processes)
        parts = [(pairs[number::num_processes], config, ready) for number in range(num_processes)]
        return _duration_s(pool.starmap(_score_part, parts, chunksize=1))


def _score_part(pairs: Pairs, config: ScorerConfig, ready: threading.Barrier) -> tuple[float, float]:
    """Score pairs once all processes have loaded the model. Return the begin and the end."""
    with Scorer.from_config(config) as scorer:
        scorer.warmup()
        ready.wait()
        start = time.time()
        for at in range(0, len(pairs), ROWS_PER_BLOCK):
            scorer.score(pairs[at : at + ROWS_PER_BLOCK])
        return start, time.time()


def _score(pairs: Pairs, config: ScorerConfig, *, num_actors: int) -> float:
    """Return the seconds that actors take to score rows from and to Parquet files."""
    with tempfile.TemporaryDirectory() as name:
        source, output, times = (Path(name) / part for part in ("in", "out", "times"))
        source.mkdir()
        times.mkdir()
        queries, passages = zip(*pairs, strict=True)
        table = pa.table({"query": list(queries), "passage": list(passages)})
        pq.write_table(table, source / "rows.parquet", row_group_size=ROWS_PER_BLOCK)
        scored = map_with_scorer(
            ray.data.read_parquet(str(source)),
            config,
            partial(_score_timed, folder=times),
            ActorOptions(num_actors=num_actors),
            rows_per_block=ROWS_PER_BLOCK,
        )
        scored.write_parquet(str(output))
        assert pq.read_table(output).num_rows == len(pairs), "rows are missing or repeated"
        spans = [json.loads(line) for path in times.iterdir() for line in path.read_text().splitlines()]
    return _duration_s(spans)


def _duration_s(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds from the first begin to the last end."""
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _score_timed(scorer: Scorer, table: pa.Table, *, folder: Path) -> pa.Table:
    """Score a table, and append its begin and end to a file of this process."""
    start = time.time()
    rows = list(zip(table.column("query").to_pylist(), table.column("passage").to_pylist(), strict=True))
    scored = table.append_column("score", pa.array(score_rows(scorer, rows), type=pa.float64()))
    with (folder / str(os.getpid())).open("a") as file:
        file.write(json.dumps([start, time.time()]) + "\n")
    return scored
