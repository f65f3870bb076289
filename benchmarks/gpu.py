"""`gpu`: measure one GPU in a few minutes: peak TFLOP/s, throughput as a share of the peak, and latency."""

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
# Number of pairs in the trial run that estimates how many pairs fit into `--seconds`.
NUM_TRIAL_PAIRS: Final = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.set_defaults(shape="large")
    parser.add_argument(
        "--also", nargs="*", choices=SHAPES, default=["base"], help="more shapes to measure latency with"
    )
    parser.add_argument("--num-pairs", type=int, default=10_000, help="most pairs when measuring throughput")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="seconds per precision when measuring throughput"
    )
    parser.add_argument(
        "--matrix-size", type=int, default=8192, help="size of the matrices that measure the peak"
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.model is not None:
        parser.error("gpu measures shapes with random weights; leave --model out")
    if args.num_pairs < 2 or args.seconds <= 0 or args.matrix_size < 1:
        parser.error("--num-pairs must be at least 2, and --seconds and --matrix-size must be positive")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if contenders do not agree."""
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
    """Return the TFLOP/s of a large bfloat16 matrix product in torch, as the median of several runs."""
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
    """Count the floating-point operations of the matrix products in a forward pass.

    Args:
        shape: The model's dimensions.
        lengths: Number of tokens in each sequence.
        all_rows: Count the whole last layer for every token, as most models compute it. If false, count the
            last layer as this package computes it: keys and values for every token, and everything else only
            for the first token.
    """
    width, inner = shape.hidden_size, shape.intermediate_size
    total = 0
    for length in lengths:
        # A multiplication and an addition per weight: query, key, value and output projections, both
        # feed-forward layers, attention scores and their weighted sums.
        of_row = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
        full, last = of_row * length, of_row + 2 * 2 * width**2 * (length - 1)
        total += full * (shape.num_layers - 1) + (full if all_rows else last) + 2 * width * (width + 1)
    return total


def _throughput(
    args: argparse.Namespace, setup: Setup, ceiling: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure throughput from text to scores on pairs of 512 tokens. On CUDA, float32 is left out."""
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
    print(f"workload E with pairs of {MAX_LENGTH} tokens, {args.shape}: from text to scores")
    report.print_table("medians", ["pairs", "wall s", "pairs/s", "tokens/s", "TFLOP/s", "of peak"], rows)
    return {"shape": args.shape, "results": results}, missing


def _latency(
    args: argparse.Namespace, shape: str, setup: Setup, missing: dict[str, str], found: list[str]
) -> list[dict[str, Any]]:
    """Measure the latency of workloads A and C for all contenders."""
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
