"""`gpu`: one GPU in a few minutes: its ceiling, throughput as a share of it, latency."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Final

import torch

from benchmarks import report
from benchmarks.common import MAX_LENGTH, quiet, reworded
from benchmarks.measure import Run, interleave, problems, reference
from benchmarks.models import SHAPES, Setup, prepared_model
from benchmarks.peers.registry import REFERENCE, is_ours, load_all
from benchmarks.speed import compare, print_workload
from benchmarks.workloads import WorkloadMaker
from bge_rerank_integrations.engine.model import EncoderShape

DEFAULT_CONTENDERS: Final = ["ours", "cross-encoder-best"]
NUM_PRODUCTS: Final = 20
# Of the pairs that show how many fit into the time there is.
NUM_TRIAL_PAIRS: Final = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes beside the common options."""
    parser.set_defaults(shape="large")
    parser.add_argument("--also", nargs="*", choices=SHAPES, default=["base"], help="shapes for latency only")
    parser.add_argument("--num-pairs", type=int, default=10_000, help="most pairs for throughput")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the throughput of each precision")
    parser.add_argument("--matrix-size", type=int, default=8192, help="of the product that the ceiling is of")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work."""
    if args.model is not None:
        parser.error("gpu times shapes; leave --model out")
    if args.num_pairs < 2 or args.seconds <= 0 or args.matrix_size < 1:
        parser.error("--num-pairs must be at least 2, --seconds and --matrix-size positive")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 1 where contenders do not agree."""
    document = report.begin(args, "repeats", "seed")
    ceiling = measure_ceiling(args.device, args.matrix_size)
    document["ceiling_tflops"] = ceiling
    print(f"bfloat16 product of {args.matrix_size} x {args.matrix_size}: {ceiling:.1f} TFLOP/s\n", flush=True)
    missing: dict[str, str] = {}
    found: list[str] = []
    document["latency"] = {}
    for shape in dict.fromkeys([args.shape, *args.also]):
        with ExitStack() as stack:
            with quiet():
                setup = stack.enter_context(prepared_model(shape=shape, model=None, device=args.device))
            if shape == args.shape:
                document["throughput"], missing = _throughput(args, setup, ceiling)
            document["latency"][shape] = _latency(args, shape, setup, missing, found)
    return report.end(document, missing=missing, problems=found)


def measure_ceiling(device: str, size: int) -> float:
    """Return the TFLOP/s of a large product in bfloat16, as torch runs it: the median of some."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(NUM_PRODUCTS + 3):
        _synchronize(device)
        began = time.perf_counter()
        a @ b
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def count_flops(shape: EncoderShape, lengths: Iterable[int], *, all_rows: bool = False) -> int:
    """Count the floating-point operations of products in a forward pass over sequences of some lengths.

    Args:
        shape: The model's dimensions.
        lengths: Tokens of each sequence.
        all_rows: Count the last layer for every token, as a model that computes all of it does. Otherwise
            as this package runs it: keys and values of every token, all else of the first alone.
    """
    width, inner = shape.hidden_size, shape.intermediate_size
    total = 0
    for length in lengths:
        # One multiplication and one addition each: query, key, value, output; up and down; scores, sums.
        of_row = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
        full, last = of_row * length, of_row + 2 * 2 * width**2 * (length - 1)
        total += full * (shape.num_layers - 1) + (full if all_rows else last) + 2 * width * (width + 1)
    return total


def _throughput(
    args: argparse.Namespace, setup: Setup, ceiling: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time text in to floats out, on pairs of 512 tokens, in every precision but float32."""
    maker = WorkloadMaker(setup.tokenizer_path, args.seed)
    keys = [key for key in args.contenders if is_ours(key) and (key != REFERENCE or not setup.on_cuda)]
    with ExitStack() as stack, quiet():
        contenders, missing = load_all(keys, setup, stack)
        workload = maker.make("E", num_pairs=args.num_pairs, length=MAX_LENGTH)
        runs = []
        for key, contender in contenders.items():
            trial = workload.pairs[:NUM_TRIAL_PAIRS]
            contender.score(reworded(trial, "warm-up"))
            began = time.perf_counter()
            contender.score(reworded(trial, "trial"))
            rate = len(trial) / (time.perf_counter() - began)
            num_pairs = min(args.num_pairs, max(int(rate * args.seconds / args.repeats), 2))
            runs.append(Run(key, contender, workload.first(num_pairs)))
        if runs:
            interleave(runs, args.repeats)
    shape = setup.shape()
    results = []
    for run in runs:
        summary = {**run.summary(), "num_pairs": len(run.workload.pairs)}
        summary["tflops"] = count_flops(shape, run.workload.num_tokens) / summary["wall_s"] / 1e12
        summary["tflops_all_rows"] = (
            count_flops(shape, run.workload.num_tokens, all_rows=True) / summary["wall_s"] / 1e12
        )
        summary["share_of_ceiling"] = summary["tflops"] / ceiling
        results.append(summary)
    rows = [
        (
            report.label(each),
            [
                f"{each['num_pairs']}",
                f"{each['wall_s']:.3f}",
                f"{each['pairs_per_s']:.1f}",
                f"{each['tokens_per_s']:.0f}",
                f"{each['tflops']:.3g}",
                f"{100 * each['share_of_ceiling']:.1f} %",
            ],
        )
        for each in results
    ]
    print(f"E at {MAX_LENGTH} tokens, {args.shape}: text in, floats out")
    report.print_table("medians", ["pairs", "wall s", "pairs/s", "tokens/s", "TFLOP/s", "of ceiling"], rows)
    return {"shape": args.shape, "results": results}, missing


def _latency(
    args: argparse.Namespace, shape: str, setup: Setup, missing: dict[str, str], found: list[str]
) -> list[dict[str, Any]]:
    """Time workloads A and C beside `CrossEncoder` at its best."""
    maker = WorkloadMaker(setup.tokenizer_path, args.seed)
    workloads = [maker.make(letter, num_pairs=min(args.num_pairs, 100)) for letter in "AC"]
    measured = []
    with ExitStack() as stack:
        with quiet():
            references = reference(setup, maker, workloads)
            contenders, not_there = load_all(args.contenders, setup, stack)
        missing |= not_there
        for workload in workloads:
            with quiet():
                results = compare(contenders, workload, references[workload.name], setup, args.repeats)
            found += [
                f"{shape}, {workload.name}: {line}" for line in problems(results, references[workload.name])
            ]
            print(f"{shape}, ", end="")
            print_workload(workload, results)
            measured.append({**workload.describe(), "results": results})
    return measured


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
