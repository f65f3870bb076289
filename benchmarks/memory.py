"""`memory`: measure the peak memory of each contender in its own process."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks import report
from benchmarks.alone import peak_bytes
from benchmarks.common import quiet
from benchmarks.models import chosen_model
from benchmarks.peers.registry import available
from benchmarks.workloads import SPECS, WorkloadMaker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument("--workload", choices=SPECS, default="A", help="workload; default: A")
    parser.add_argument("--num-pairs", type=int, help="use only this many pairs")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="batch size of contenders that do not choose it themselves; default: 32",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.num_pairs is not None and args.num_pairs < 2:
        parser.error("--num-pairs must be at least 2")
    if args.batch_size < 1:
        parser.error("--batch-size must be positive")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with chosen_model(args) as setup:
        with quiet():
            workload = WorkloadMaker(setup.tokenizer_path, args.seed).make(
                args.workload, num_pairs=args.num_pairs
            )
        setup = setup.calibrated_with(workload.pairs)
        document = report.begin(args, "batch_size", "seed")
        results = {}
        missing = {}
        for key in args.contenders:
            measured = available(partial(peak_bytes, key, setup, workload.pairs, args.batch_size))
            if isinstance(measured, str):
                missing[key] = measured
            else:
                results[key] = measured
    document |= {"workload": workload.describe(), "results": results}
    columns = ("peak_bytes", "before_bytes", *(["peak_gpu_bytes"] if setup.on_cuda else []))
    rows = [
        (key, [f"{measured[column] / 2**20:.0f}" for column in columns]) for key, measured in results.items()
    ]
    report.print_table("MiB", ["peak", "before", "peak GPU"][: len(columns)], rows)
    return report.end(document, missing=missing, problems=[])
