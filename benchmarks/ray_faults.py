"""A batch job whose actors and driver are killed: does each row come out once, with the right score?"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from benchmarks.common import Pairs
from benchmarks.models import Setup
from benchmarks.ray_common import ROWS_PER_BLOCK, TOLERANCE, descendants, make_pairs
from bge_rerank_integrations import Scorer

_NUM_FILES: Final = 8
_NUM_ACTORS: Final = 2
_NUM_ACTOR_KILLS: Final = 10
_NUM_DRIVER_KILLS: Final = 2
_ACTOR: Final = b"MapWorker(MapBatches(_ScoringActor))"
_POLL_S: Final = 0.2
# A driver that was killed takes its cluster with it. Its processes have this long to end.
_CLUSTER_END_S: Final = 10.0


def measure_faults(setup: Setup, num_rows: int, seed: int, problems: list[str]) -> dict[str, Any]:
    """Rank rows from the command line, kill actors and the driver, and check what comes out.

    Args:
        setup: The model.
        num_rows: Number of rows, each with one passage.
        seed: Seed of the rows and of the times of the kills.
        problems: Receives what is wrong.

    Returns:
        The figures to print.
    """
    pairs = make_pairs(setup, num_rows, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(pairs, folder / "in")
        job = _Job(setup, folder, num_rows)
        started = time.perf_counter()
        num_kills = job.run_with_kills(random.Random(seed))
        elapsed_s = time.perf_counter() - started
        rows = _read(folder / "out")
    with Scorer(setup.model, device=setup.device, num_threads=2, dtype="float32") as scorer:
        expected = scorer.score(pairs)
    counts = Counter(number for number, _ in rows)
    worst = max((abs(score - expected[number]) for number, score in rows), default=0.0)
    missing = num_rows - len(counts)
    repeated = sum(count > 1 for count in counts.values())
    if missing or repeated:
        problems.append(f"faults: {missing} rows are missing and {repeated} rows are repeated")
    if worst > TOLERANCE:
        problems.append(f"faults: a score differs by {worst:.1e} from that of a single process")
    if num_kills != (_NUM_ACTOR_KILLS, _NUM_DRIVER_KILLS):
        problems.append(f"faults: only {num_kills[0]} actors and {num_kills[1]} drivers were killed in time")
    return {
        "rows": len(rows),
        "missing": missing,
        "repeated": repeated,
        "largest difference": f"{worst:.1e}",
        "actors killed": num_kills[0],
        "drivers killed": num_kills[1],
        "seconds": round(elapsed_s, 1),
    }


class _Job:
    """The command that ranks the rows. It can be started again after it was killed."""

    def __init__(self, setup: Setup, folder: Path, num_rows: int) -> None:
        self._output = folder / "out"
        self._num_files = num_rows / ROWS_PER_BLOCK
        self._log = folder / "log"
        self._command = [
            *(sys.executable, "-m", "bge_rerank_integrations.cli", "rank", "--ray=local"),
            *(str(folder / "in"), "-o", str(self._output), "--model", setup.model, "--device", setup.device),
            *("--dtype", "float32", "--num-threads", "1", "--num-actors", str(_NUM_ACTORS)),
            *("--rows-per-block", str(ROWS_PER_BLOCK)),
        ]

    def run_with_kills(self, rng: random.Random) -> tuple[int, int]:
        """Run the command to its end. Return how many actors and drivers were killed on the way."""
        kinds = ["actor"] * _NUM_ACTOR_KILLS + ["driver"] * _NUM_DRIVER_KILLS
        rng.shuffle(kinds)
        # Shares of the output at which the kills happen.
        plan = sorted(zip(sorted(rng.uniform(0.05, 0.9) for _ in kinds), kinds, strict=True))
        num_actors = num_drivers = 0
        process = self._start()
        while process.poll() is None:
            time.sleep(_POLL_S)
            if not plan or self._share() < plan[0][0]:
                continue
            if plan[0][1] == "driver":
                process.kill()
                process.wait()
                num_drivers += 1
                time.sleep(_CLUSTER_END_S)
                process = self._start()
                plan.pop(0)
            elif actors := descendants(process.pid, _ACTOR):
                os.kill(rng.choice(actors), signal.SIGKILL)
                num_actors += 1
                plan.pop(0)
        if process.returncode:
            raise RuntimeError(f"the job ended with status {process.returncode}:\n{self._log.read_text()}")
        return num_actors, num_drivers

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def _share(self) -> float:
        """Return the share of the output files that are written."""
        return sum(1 for _ in self._output.glob("*.jsonl")) / self._num_files


def _write(pairs: Pairs, folder: Path) -> None:
    folder.mkdir()
    for part in range(_NUM_FILES):
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(part, len(pairs), _NUM_FILES):
                query, passage = pairs[number]
                file.write(json.dumps({"id": number, "query": query, "passages": [passage]}) + "\n")


def _read(folder: Path) -> list[tuple[int, float]]:
    """Return the number and score of each row."""
    rows = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((row["id"], row["results"][0]["score"]))
    return rows
