"""Run the stress figures and print their results."""

from __future__ import annotations

import argparse
import faulthandler
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import stress
from benchmarks.common import describe_hardware, quiet, version
from benchmarks.stress.callers import concurrent_calls, event_loop_gaps, identical_pairs, shared_documents
from benchmarks.stress.checkpoints import bad_checkpoints
from benchmarks.stress.common import Bench, Outcome
from benchmarks.stress.inputs import every_length, malformed_inputs, scores_not_finite
from benchmarks.stress.memory import memory_growth, memory_of_a_job
from benchmarks.stress.privacy import canaries
from benchmarks.stress.process import fork_after_use, interpreter_exit
from benchmarks.stress.queue import (
    cancelled_calls,
    injected_errors,
    killed_workers,
    poisoned_batches,
    queue_cap,
)
from bge_rerank_integrations import Scorer
from examples.random_checkpoint import build_random_checkpoint, read_texts

DISTRIBUTIONS: Final = ("torch", "tokenizers", "safetensors", "langchain-core", "llama-index-core")
# A figure that takes longer than this hangs. The process then ends and prints the stack of every thread.
FIGURE_LIMIT_S: Final = 3600.0


@dataclass(frozen=True)
class Figure:
    """One stress measurement, which is one row of the table."""

    what: str
    expected: str
    run: Callable[[Bench], Outcome]


FIGURES: Final = {
    1: Figure("64 threads score, 8 threads tokenize", "0 errors, off by 1e-5, 0 wrong", concurrent_calls),
    2: Figure("async calls cancelled at random", "0 hang, 0 scored, empty in 1 s", cancelled_calls),
    3: Figure("event loop while 256 pairs are reranked", "p99 gap up to 50 ms", event_loop_gaps),
    4: Figure("full queue", "refused in 10 ms, others right", queue_cap),
    5: Figure("one failing pair among 16 callers", "15 right, 1 typed error", poisoned_batches),
    6: Figure("out-of-memory and other errors", "right or typed, budget recovers", injected_errors),
    7: Figure("worker killed with 50 waiting requests", "no wait over 1 s", killed_workers),
    8: Figure("NaN and infinite scores", "none returned or sorted", scores_not_finite),
    9: Figure("lengths 1 to 600, 514 positions", "up to 512 tokens, cuts reported", every_length),
    10: Figure("malformed inputs", "finite score, or error with index", malformed_inputs),
    11: Figure("damaged and hostile checkpoints", "all refused, no code executed", bad_checkpoints),
    12: Figure("memory over requests of varying shape", "growth up to 5 %", memory_growth),
    13: Figure("secret words in logs, errors and dumps", "0 found", canaries),
    14: Figure("documents shared by 8 threads", "0 mutated", shared_documents),
    15: Figure("same pair in random batches", "off by 1e-5, repeats identical", identical_pairs),
    16: Figure("interpreter exit with 100 queued requests", "5 s, exit code 0, no output", interpreter_exit),
    17: Figure("fork after use", "typed error in 1 s", fork_after_use),
    18: Figure("memory of a job of 100,000 pairs", "up to 300 MB above the model", memory_of_a_job),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the figures. Return 1 if a figure fails, else 0."""
    args = _parse(argv)
    hardware = describe_hardware("cpu")
    versions = {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS}}
    for title, values in (("hardware", hardware), ("versions", versions)):
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    print(f"\n{'':>2}  {'figure':42}{'expected':34}{'':6}{'seconds':>7}  measured")
    with tempfile.TemporaryDirectory() as folder, _fixtures(Path(folder), args.scale) as bench:
        results = [_measure(number, bench) for number in args.only]
    report = {"hardware": hardware, "versions": versions, "scale": args.scale, "results": results}
    print(json.dumps(report))
    return 0 if all(result["passed"] for result in results) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stress", description=stress.__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--only",
        default=",".join(map(str, FIGURES)),
        help="numbers of the figures to run, separated by commas",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of repetitions by this")
    args = parser.parse_args(argv)
    try:
        args.only = [int(number) for number in args.only.split(",")]
    except ValueError:
        parser.error("--only takes numbers, separated by commas")
    if not set(args.only) <= set(FIGURES) or not args.scale > 0:
        parser.error(f"--only takes numbers from {min(FIGURES)} to {max(FIGURES)}; --scale must be positive")
    return args


@contextmanager
def _fixtures(folder: Path, scale: float) -> Iterator[Bench]:
    with quiet():
        checkpoint = build_random_checkpoint(folder / "small")
    with Scorer(checkpoint, device="cpu") as scorer:
        yield Bench(folder, checkpoint, scorer, read_texts(), scale)


def _measure(number: int, bench: Bench) -> dict[str, Any]:
    """Run one figure and print its row."""
    figure = FIGURES[number]
    began = time.monotonic()
    faulthandler.dump_traceback_later(FIGURE_LIMIT_S, exit=True)
    try:
        with quiet():
            outcome = figure.run(bench)
    except Exception as error:
        outcome = Outcome(False, type(error).__name__)
        traceback.print_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - began
    verdict = "pass" if outcome.passed else "FAIL"
    print(
        f"{number:>2}  {figure.what:42}{figure.expected:34}{verdict:6}{seconds:>7.1f}  {outcome.measured}",
        flush=True,
    )
    return {
        "number": number,
        "what": figure.what,
        "expected": figure.expected,
        "measured": outcome.measured,
        "passed": outcome.passed,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
