"""`speed`: measure the speed of every contender on named workloads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks import report
from benchmarks.alone import peak_bytes
from benchmarks.common import quiet
from benchmarks.measure import (
    Reference,
    Run,
    add_ratios,
    check,
    interleave,
    problems,
    reference,
    tune,
)
from benchmarks.models import Setup, chosen_model
from benchmarks.peers.contender import Contender
from benchmarks.peers.registry import load_all
from benchmarks.plots import plot_speed
from benchmarks.workloads import LETTERS, REAL_TEXT, SPECS, Workload, WorkloadMaker

MANY: Final = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument("--workload", nargs="+", choices=LETTERS, default=["A"], help="workloads; default: A")
    parser.add_argument("--num-pairs", type=int, help="use only this many pairs of each workload")
    parser.add_argument("--beir", type=Path, help="BEIR folder with the texts of workload F")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure the peak memory of each contender in its own process",
    )
    parser.add_argument("--plot", type=Path, help="plot throughput into this .png, .svg or .pdf file")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.num_pairs is not None and args.num_pairs < 2:
        parser.error("--num-pairs must be at least 2")
    if REAL_TEXT in args.workload and args.beir is None:
        parser.error(f"workload {REAL_TEXT} needs --beir FOLDER")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if contenders do not agree."""
    with ExitStack() as stack:
        with quiet():
            setup = stack.enter_context(chosen_model(args))
            maker = WorkloadMaker(setup.tokenizer_path, args.seed)
            workloads = [
                maker.make_real(args.beir, args.num_pairs)
                if letter == REAL_TEXT
                else maker.make(letter, num_pairs=min(args.num_pairs or MANY, SPECS[letter].num_pairs))
                for letter in args.workload
            ]
            setup = setup.calibrated_with([pair for workload in workloads for pair in workload.pairs])
        document = report.begin(args, "repeats", "seed")
        with quiet():
            references = reference(setup, maker, workloads)
            contenders, missing = load_all(args.contenders, setup, stack)
        found: list[str] = []
        document["workloads"] = []
        for workload in workloads:
            with quiet():
                results = compare(contenders, workload, references[workload.name], setup, args.repeats)
                if args.memory:
                    _add_memory(results, setup, workload)
            found += [f"{workload.name}: {line}" for line in problems(results, references[workload.name])]
            document["workloads"].append({**workload.describe(), "results": results})
            print_workload(workload, results)
    if args.plot:
        plot_speed(document, args.plot)
    return report.end(document, missing=missing, problems=found)


def compare(
    contenders: Mapping[str, Contender],
    workload: Workload,
    reference: Reference,
    setup: Setup,
    repeats: int,
) -> list[dict[str, Any]]:
    """Check, tune and time contenders on one workload. Return one result per contender."""
    padding_idx = setup.shape().padding_idx
    checks = {}
    for key, contender in contenders.items():
        tune(contender, workload.pairs)
        checks[key] = check(contender, reference, padding_idx)
    runs = [Run(key, contender, workload) for key, contender in contenders.items()]
    interleave(runs, repeats)
    results = [{**run.summary(), **checks[run.key]} for run in runs]
    add_ratios(results)
    return results


def _add_memory(results: Sequence[dict[str, Any]], setup: Setup, workload: Workload) -> None:
    for result in results:
        result |= peak_bytes(result["key"], setup, workload.pairs, result["batch_size"])


def print_workload(workload: Workload, results: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of one workload."""
    description = workload.describe()
    print(
        f"{workload.name}: {workload.title}; {description['num_pairs']} pairs, "
        f"{description['num_tokens']} tokens, median {description['median_tokens']:.0f}, "
        f"longest {description['max_tokens']}"
    )
    columns = [
        "batch",
        "wall s",
        "CPU s",
        "pairs/s",
        "tokens/s",
        "rows/token",
        "x CrossEnc",
        "x best",
        "off by",
    ]
    has_memory = any("peak_bytes" in result for result in results)
    rows = []
    for result in results:
        cells = [
            report.figure(result["batch_size"], "d"),
            f"{result['wall_s']:.4f}",
            f"{result['cpu_s']:.4f}",
            f"{result['pairs_per_s']:.1f}",
            f"{result['tokens_per_s']:.0f}",
            f"{result['rows_per_token']:.2f}",
            report.figure(result["times_cross_encoder"], ".2f"),
            report.figure(result["times_best_peer"], ".2f"),
            f"{result['max_difference']:.1e}",
        ]
        if has_memory:
            cells.append(f"{result['peak_bytes'] / 2**20:.0f}")
        rows.append((report.label(result), cells))
    report.print_table("medians", [*columns, *(["peak MiB"] if has_memory else [])], rows)
