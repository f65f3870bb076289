"""`gpu`: measure one GPU in a few minutes: kernels, share of the peak, latency, CUDA graphs and a profile."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast, get_args

from benchmarks import report
from benchmarks.common import MAX_LENGTH, reworded
from benchmarks.device_only import device_seconds, load_model, measure_ceiling, prepare, profile_kernels
from benchmarks.measure import Run, interleave, problems, reference
from benchmarks.models import SHAPES, Setup, prepared_model
from benchmarks.peers.contender import NotAvailableError
from benchmarks.peers.ours import require_dtype
from benchmarks.peers.registry import load_all
from benchmarks.speed import compare, print_workload
from benchmarks.workloads import Workload, WorkloadMaker
from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.config import DType
from bge_rerank_integrations.engine.describe import describe_machine
from bge_rerank_integrations.engine.shape import EncoderShape

DEFAULT_CONTENDERS: Final = ["ours", "cross-encoder-best"]
# Number of pairs in the trial run that estimates how many pairs fit into `--seconds`.
NUM_TRIAL_PAIRS: Final = 512
# Number of pairs that the profile covers.
NUM_PROFILED_PAIRS: Final = 64
# Number of pairs whose time on the device is measured in float32. It is several times slower.
NUM_FLOAT32_PAIRS: Final = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.set_defaults(shape="large")
    parser.add_argument(
        "--also", nargs="*", choices=SHAPES, default=["base"], help="more shapes to measure latency with"
    )
    parser.add_argument("--num-pairs", type=int, default=10_000, help="most pairs when measuring throughput")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="seconds per precision when measuring throughput"
    )
    parser.add_argument(
        "--matrix-size", type=int, default=8192, help="size of the matrices that measure the peak"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json of a real model, such as XLM-RoBERTa's with 250,002 pieces; "
        "default: the small tokenizer of the examples",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.model is not None:
        parser.error("gpu measures shapes with random weights; leave --model out")
    if args.num_pairs < 2 or args.seconds <= 0 or args.matrix_size < 1:
        parser.error("--num-pairs must be at least 2, and --seconds and --matrix-size must be positive")
    if args.tokenizer is not None and not args.tokenizer.is_file():
        parser.error(f"--tokenizer {args.tokenizer} is not a file")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if contenders do not agree."""
    document = report.begin(args, "repeats", "seed", "tokenizer")
    document["settings"]["tokenizer"] = None if args.tokenizer is None else str(args.tokenizer)
    missing: dict[str, str] = {}
    found: list[str] = []
    document["latency"], document["graphs"] = {}, {}
    with _logs_on_stdout():
        for shape in dict.fromkeys([args.shape, *args.also]):
            with prepared_model(
                shape=shape, model=None, device=args.device, tokenizer=args.tokenizer
            ) as setup:
                maker = WorkloadMaker(setup.tokenizer_path, args.seed)
                if shape == args.shape:
                    dtypes = _usable_dtypes(setup, missing)
                    main = "float16" if "float16" in dtypes else dtypes[0]
                    document["machine"] = _describe(dtypes, setup)
                    document["ceiling_tflops"] = _ceilings(args, dtypes)
                    ceilings = document["ceiling_tflops"]
                    document["throughput"] = _throughput(args, dtypes, setup, maker, missing, ceilings)
                    document["profile"] = _profile(setup, maker, main)
                document["graphs"][shape] = _graphs(args, shape, main, setup, maker)
                document["latency"][shape] = _latency(args, shape, setup, maker, missing, found)
    return report.end(document, missing=missing, problems=found)


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


@contextmanager
def _logs_on_stdout() -> Iterator[None]:
    """Print what this package logs, such as which kernels it chose and why it left others out.

    A line that comes again, because the same model is loaded again, is printed once.
    """
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        return line not in seen and not seen.add(line)  # type: ignore[func-returns-value]

    logger = logging.getLogger("bge_rerank_integrations")
    handler, level = logging.StreamHandler(sys.stdout), logger.level
    handler.setFormatter(logging.Formatter("log: %(message)s"))
    handler.addFilter(is_new)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _usable_dtypes(setup: Setup, missing: dict[str, str]) -> list[str]:
    """Return the precisions that the device computes in. Precisions that it would emulate are missing."""
    usable = []
    for dtype in get_args(DType):
        if dtype == "auto":
            continue
        try:
            require_dtype(dtype, setup)
        except NotAvailableError as error:
            missing[f"ours-{dtype}"] = str(error)
        else:
            usable.append(dtype)
    return usable


def _describe(dtypes: list[str], setup: Setup) -> dict[str, Any]:
    """Print what `bge-rerank info` says about the machine, for each precision."""
    machines = {}
    for dtype in dtypes:
        config = ScorerConfig(device=setup.device, dtype=cast(DType, dtype))
        machines[dtype] = dataclasses.asdict(describe_machine(config))
        print(f"\n{dtype}:")
        for name, value in machines[dtype].items():
            print(f"  {name:18} {value}")
    print(flush=True)
    return machines


def _ceilings(args: argparse.Namespace, dtypes: list[str]) -> dict[str, float | None]:
    ceilings = {dtype: measure_ceiling(args.device, dtype, args.matrix_size) for dtype in dtypes}
    rows = [(dtype, [report.figure(speed, ".4g")]) for dtype, speed in ceilings.items()]
    report.print_table(f"product of {args.matrix_size} x {args.matrix_size}", ["TFLOP/s"], rows)
    return ceilings


def _throughput(
    args: argparse.Namespace,
    dtypes: list[str],
    setup: Setup,
    maker: WorkloadMaker,
    missing: dict[str, str],
    ceilings: dict[str, float | None],
) -> dict[str, Any]:
    """Measure pairs of 512 tokens on the device alone, and from text to scores except for float32 on CUDA."""
    workload = maker.make("E", num_pairs=args.num_pairs, length=MAX_LENGTH)
    results = {
        dtype: {"dtype": dtype, **_device_throughput(args, dtype, setup, maker, workload)} for dtype in dtypes
    }
    wanted = [f"ours-{dtype}" for dtype in dtypes if not (setup.on_cuda and dtype == "float32")]
    keys = [key for key in args.contenders if key in wanted]
    for run in _timed_runs(args, keys, setup, workload, missing):
        summary = run.summary()
        lengths, wall_s = run.workload.num_tokens, summary["wall_s"]
        results[summary["dtype"]] |= {
            **summary,
            "num_pairs": len(lengths),
            "tflops": count_flops(setup.shape(), lengths) / wall_s / 1e12,
            "tflops_all_rows": count_flops(setup.shape(), lengths, all_rows=True) / wall_s / 1e12,
        }
    rows = []
    for dtype, result in results.items():
        for place in ("", "device_"):
            ceiling, speed = ceilings[dtype], result.get(f"{place}tflops")
            share = None if ceiling is None or speed is None else speed / ceiling
            result[f"{place}share_of_ceiling"] = share
        cells = [
            report.figure(result.get(name), spec)
            for name, spec in (
                ("device_graphs", "d"),
                ("device_pairs_per_s", ".1f"),
                ("device_tflops", ".3g"),
                ("device_share_of_ceiling", ".1%"),
                ("num_pairs", "d"),
                ("pairs_per_s", ".1f"),
                ("tflops", ".3g"),
                ("share_of_ceiling", ".1%"),
            )
        ]
        rows.append((dtype, cells))
    print(
        f"workload E with pairs of {MAX_LENGTH} tokens, {args.shape}: ids on the device, then text to scores"
    )
    columns = ["graphs", "dev pairs/s", "dev TFLOP/s", "of peak", "pairs", "pairs/s", "TFLOP/s", "of peak"]
    report.print_table("medians", columns, rows, width=13)
    return {"shape": args.shape, "results": list(results.values())}


def _device_throughput(
    args: argparse.Namespace, dtype: str, setup: Setup, maker: WorkloadMaker, workload: Workload
) -> dict[str, Any]:
    num_pairs = NUM_FLOAT32_PAIRS if dtype == "float32" and setup.on_cuda else NUM_TRIAL_PAIRS
    ids = maker.ids(workload.pairs[:num_pairs])
    loaded = load_model(setup, dtype)
    seconds = device_seconds(loaded, ids, args.repeats)
    flops = count_flops(setup.shape(), [len(each) // 4 for each in ids])
    return {
        "device_graphs": loaded.num_graphs,
        "device_pairs_per_s": len(ids) / seconds,
        "device_tflops": flops / seconds / 1e12,
    }


def _timed_runs(
    args: argparse.Namespace, keys: list[str], setup: Setup, workload: Workload, missing: dict[str, str]
) -> list[Run]:
    """Time contenders for about `--seconds` each."""
    trial = workload.pairs[:NUM_TRIAL_PAIRS]
    runs = []
    with ExitStack() as stack:
        contenders, not_there = load_all(keys, setup, stack)
        missing |= not_there
        for key, contender in contenders.items():
            contender.score(reworded(trial, "warm-up"))
            began = time.perf_counter()
            contender.score(reworded(trial, "trial"))
            rate = len(trial) / (time.perf_counter() - began)
            num_pairs = min(args.num_pairs, max(int(rate * args.seconds / args.repeats), 2))
            runs.append(Run(key, contender, workload.first(num_pairs)))
        if runs:
            interleave(runs, args.repeats)
    return runs


def _profile(setup: Setup, maker: WorkloadMaker, dtype: str) -> dict[str, Any]:
    """Print the kernels that take most of the time."""
    workload = maker.make("E", num_pairs=NUM_PROFILED_PAIRS, length=MAX_LENGTH)
    kernels = profile_kernels(
        load_model(setup, dtype, capture_graphs=False, num_threads=1), maker.ids(workload.pairs)
    )
    rows = [
        (
            each["name"][:90],
            [f"{each['calls']}", f"{each['microseconds']:.0f}", f"{each['share']:.1%}"],
        )
        for each in kernels
    ]
    print(f"{len(workload.pairs)} pairs of {MAX_LENGTH} tokens in {dtype}, without graphs")
    report.print_table("kernel", ["calls", "microseconds", "share"], rows, width=14)
    return {"dtype": dtype, "num_pairs": len(workload.pairs), "kernels": kernels}


class Variant(NamedTuple):
    """A workload with CUDA graphs or without."""

    workload: Workload
    capture_graphs: bool

    def label(self, dtype: str) -> str:
        """Return a name for a table."""
        return f"{self.workload.name}, {dtype}, {'graphs' if self.capture_graphs else 'no graphs'}"


def _graphs(
    args: argparse.Namespace, shape: str, dtype: str, setup: Setup, maker: WorkloadMaker
) -> list[dict[str, Any]]:
    """Measure workloads D and A with CUDA graphs and without, on the device alone and from text to scores."""
    num_pairs = min(args.num_pairs, 100)
    few, many = maker.make("D", num_pairs=min(num_pairs, 8)), maker.make("A", num_pairs=num_pairs)
    variants = [Variant(workload, graphs) for graphs in (True, False) for workload in (few, many)]
    rows, results = [], []
    for variant in variants:
        result = _variant(args, dtype, variant, setup, maker)
        results.append(result)
        cells = [
            f"{result['graphs']}",
            f"{result['replayed']} of {result['batches']}",
            f"{1e3 * result['device_s']:.3f}",
            f"{1e3 * result['wall_s']:.3f}",
        ]
        rows.append((variant.label(dtype), cells))
    print(f"{shape}: CUDA graphs; ids on the device, then text to scores")
    report.print_table("medians", ["graphs", "replayed", "device ms", "wall ms"], rows)
    return results


def _variant(
    args: argparse.Namespace, dtype: str, variant: Variant, setup: Setup, maker: WorkloadMaker
) -> dict[str, Any]:
    workload, capture_graphs = variant
    ids = maker.ids(workload.pairs)
    loaded = load_model(setup, dtype, capture_graphs=capture_graphs)
    prepared = prepare(loaded, ids)
    return {
        "workload": workload.name,
        "dtype": dtype,
        "graphs": loaded.num_graphs,
        "batches": len(prepared.batches),
        "replayed": prepared.num_replayed,
        "device_s": device_seconds(loaded, ids, args.repeats * workload.num_calls),
        "wall_s": _text_to_scores(args, setup, dtype, variant),
    }


def _text_to_scores(args: argparse.Namespace, setup: Setup, dtype: str, variant: Variant) -> float:
    """Return the median seconds of one call."""
    with Scorer(
        setup.model,
        device=setup.device,
        dtype=cast(DType, dtype),
        capture_graphs=variant.capture_graphs,
    ) as scorer:
        scorer.score(reworded(variant.workload.pairs, "warm-up"))
        seconds = []
        for repeat in range(args.repeats):
            for pairs in variant.workload.texts(repeat):
                began = time.perf_counter()
                scorer.score(pairs)
                seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _latency(
    args: argparse.Namespace,
    shape: str,
    setup: Setup,
    maker: WorkloadMaker,
    missing: dict[str, str],
    found: list[str],
) -> list[dict[str, Any]]:
    """Measure the latency of workloads D, A and C for all contenders."""
    workloads = [maker.make(letter, num_pairs=min(args.num_pairs, 100)) for letter in "AC"]
    workloads.insert(0, maker.make("D", num_pairs=min(args.num_pairs, 8)))
    measured = []
    with ExitStack() as stack:
        references = reference(setup, maker, workloads)
        contenders, not_there = load_all(args.contenders, setup, stack)
        missing |= not_there
        for workload in workloads:
            results = compare(contenders, workload, references[workload.name], setup, args.repeats)
            found += [
                f"{shape}, {workload.name}: {line}" for line in problems(results, references[workload.name])
            ]
            print(f"{shape}, ", end="")
            print_workload(workload, results)
            measured.append({**workload.describe(), "results": results})
    return measured
