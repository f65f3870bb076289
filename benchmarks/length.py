"""`length`: measure throughput for pairs of different lengths."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.common import MAX_LENGTH, quiet
from benchmarks.measure import problems, reference
from benchmarks.models import chosen_model
from benchmarks.peers.registry import load_all
from benchmarks.plots import plot_length
from benchmarks.speed import compare
from benchmarks.workloads import WorkloadMaker

LENGTHS: Final = (64, 128, 256, 512)
MIN_LENGTH: Final = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of each pair")
    parser.add_argument("--num-pairs", type=int, default=100, help="pairs per length; default: 100")
    parser.add_argument("--plot", type=Path, help="plot throughput into this .png, .svg or .pdf file")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.num_pairs < 2:
        parser.error("--num-pairs must be at least 2")
    if not all(MIN_LENGTH <= length <= MAX_LENGTH for length in args.lengths):
        parser.error(f"--lengths must be from {MIN_LENGTH} to {MAX_LENGTH}")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if contenders do not agree."""
    with ExitStack() as stack:
        with quiet():
            setup = stack.enter_context(chosen_model(args))
            maker = WorkloadMaker(setup.tokenizer_path, args.seed)
            workloads = {
                length: maker.make("A", num_pairs=args.num_pairs, length=length, name=f"{length} tokens")
                for length in sorted(set(args.lengths))
            }
            setup = setup.calibrated_with([pair for each in workloads.values() for pair in each.pairs])
        document = report.begin(args, "num_pairs", "repeats", "seed")
        found: list[str] = []
        document["workloads"] = []
        with quiet():
            references = reference(setup, maker, list(workloads.values()))
            contenders, missing = load_all(args.contenders, setup, stack)
            for length, workload in workloads.items():
                results = compare(contenders, workload, references[workload.name], setup, args.repeats)
                found += [f"{length}: {line}" for line in problems(results, references[workload.name])]
                document["workloads"].append({"length": length, **workload.describe(), "results": results})
    rows = [
        (
            report.label(result),
            [f"{each['results'][index]['tokens_per_s']:.0f}" for each in document["workloads"]],
        )
        for index, result in enumerate(document["workloads"][0]["results"])
    ]
    report.print_table("tokens/s by tokens per pair", [f"{length}" for length in workloads], rows)
    if args.plot:
        plot_length(document, args.plot)
    return report.end(document, missing=missing, problems=found)
