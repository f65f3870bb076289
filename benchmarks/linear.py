"""`linear`: verify that throughput does not drop with the number of pairs."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Final

from benchmarks import report
from benchmarks.common import quiet, reworded
from benchmarks.measure import Run, interleave
from benchmarks.models import chosen_model
from benchmarks.peers.registry import is_ours, load_all
from benchmarks.workloads import WorkloadMaker

FEW, MANY = 1_000, 10_000
MIN_RATIO: Final = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument("--few", type=int, default=FEW, help=f"pairs in the small run; default: {FEW}")
    parser.add_argument("--many", type=int, default=MANY, help=f"pairs in the large run; default: {MANY}")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if not 2 <= args.few < args.many:
        parser.error("--few must be at least 2 and less than --many")
    args.contenders = [key for key in args.contenders if is_ours(key)]
    if not args.contenders:
        parser.error("--contenders must name one of this package's contenders, such as ours")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if the large run is more than 10 % slower per token."""
    with ExitStack() as stack:
        with quiet():
            setup = stack.enter_context(chosen_model(args))
            maker = WorkloadMaker(setup.tokenizer_path, args.seed)
            workloads = [
                maker.make("E", num_pairs=count, name=f"{count} pairs") for count in (args.few, args.many)
            ]
            contenders, missing = load_all(args.contenders, setup, stack)
        document = report.begin(args, "repeats", "seed")
        with quiet():
            for contender in contenders.values():
                contender.score(reworded(workloads[0].pairs, "warm-up"))
            runs = [
                Run(key, contender, workload)
                for key, contender in contenders.items()
                for workload in workloads
            ]
            interleave(runs, args.repeats)
    results = []
    rows = []
    found = []
    for few, many in zip(runs[::2], runs[1::2], strict=True):
        small, large = few.summary(), many.summary()
        # Compare by tokens, because the average length of a few random pairs differs from that of many.
        ratio = large["tokens_per_s"] / small["tokens_per_s"]
        results.append({"key": few.key, "few": small, "many": large, "ratio": ratio})
        cells = [f"{each[unit]:.1f}" for unit in ("pairs_per_s", "tokens_per_s") for each in (small, large)]
        rows.append((report.label(small), [*cells, f"{ratio:.3f}"]))
        if not ratio >= MIN_RATIO:
            found.append(
                f"{report.label(small)}: {args.many} pairs run at {ratio:.3f} of the speed of {args.few}"
            )
    columns = [f"{unit}, {count}" for unit in ("pairs/s", "tokens/s") for count in (args.few, args.many)]
    report.print_table("medians", [*columns, "ratio"], rows, width=18)
    document |= {"workloads": [workload.describe() for workload in workloads], "results": results}
    return report.end(document, missing=missing, problems=found)
