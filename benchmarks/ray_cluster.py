"""`ray`: kill actors, drivers and replicas on this machine, and measure what a second actor brings."""

from __future__ import annotations

import argparse
from typing import Final

from benchmarks import report
from benchmarks.models import chosen_model

PARTS: Final = ("faults", "speed", "serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="faults: a batch job whose actors and driver are killed; speed: one and two actors; "
        "serve: replicas that are killed and updated; default: all",
    )
    parser.add_argument("--num-rows", type=int, default=100_000, help="rows of a batch job; default: 100,000")
    parser.add_argument("--num-requests", type=int, default=5_000, help="requests of serve; default: 5,000")
    parser.add_argument("--num-clients", type=int, default=32, help="clients of serve; default: 32")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    for name in ("num_rows", "num_requests", "num_clients"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # Only this command needs the extra `ray`.
    from benchmarks.ray_faults import measure_faults
    from benchmarks.ray_serve import measure_serve
    from benchmarks.ray_speed import measure_speed

    results = {}
    problems: list[str] = []
    with chosen_model(args) as setup:
        document = report.begin(args, "num_rows", "num_requests", "num_clients", "seed")
        if "faults" in args.parts:
            results["faults"] = measure_faults(setup, args.num_rows, args.seed, problems)
        if "speed" in args.parts:
            results["speed"] = measure_speed(setup, args.num_rows, args.seed, problems)
        if "serve" in args.parts:
            results["serve"] = measure_serve(setup, args.num_requests, args.num_clients, args.seed, problems)
    for part, figures in results.items():
        report.print_table(part, [""], [(name, [str(value)]) for name, value in figures.items()])
    return report.end(document | {"results": results}, missing={}, problems=problems)
