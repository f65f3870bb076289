"""Compare this package with sentence-transformers and FlagEmbedding on the same pairs, in one run.

    python -m benchmarks.compare [--shape base|large | --model FOLDER_OR_ID] [--device cpu|cuda]

`benchmarks/README.md` says what is compared and how to read it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict, get_args

import torch

from benchmarks.common import (
    Pairs,
    cpu_features,
    describe_hardware,
    import_optional,
    make_pairs,
    quiet,
    version,
)
from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.config import DType
from bge_rerank_integrations.engine.checkpoint import find_checkpoint
from bge_rerank_integrations.tokenization import PairTokenizer
from examples.random_checkpoint import build_random_checkpoint

OURS: Final = "bge-rerank-integrations"
SENTENCE_TRANSFORMERS: Final = "sentence-transformers"
FLAG_EMBEDDING: Final = "FlagEmbedding"
DISTRIBUTIONS: Final = ("torch", "transformers", "tokenizers", SENTENCE_TRANSFORMERS, FLAG_EMBEDDING)


MAX_FLOAT32_DIFFERENCE: Final = 1e-4
MIN_SCORE_STD: Final = 0.1

SHAPES: Final[dict[str, dict[str, int]]] = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096},
}
VOCAB_SIZE: Final = 250_002

Ids = tuple[int, ...]


@dataclass
class Contender:
    """One way to score the pairs.

    Attributes:
        name: The package.
        dtype: Its precision.
        score: Scores the pairs as a user would; this is timed.
        logits: Scores them without an activation.
        module: The transformers model, whose inputs tell what is computed; None for ours.
        wall_s: Seconds of each repeat.
        cpu_s: Seconds of processor time of each repeat, over all threads.
    """

    name: str
    dtype: str
    score: Callable[[], object]
    logits: Callable[[], Iterable[float]]
    module: Any = None
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


class Result(TypedDict):
    """What came of one contender; `positions` counts padding and whatever is computed twice."""

    name: str
    dtype: str
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    tokens: int
    positions: int
    same_ids: bool
    times_as_fast_as: dict[str, float]
    max_difference: dict[str, float]
    wall_s_all: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status is 1 where contenders do not agree."""
    args = _parse(argv)
    with ExitStack() as stack, quiet():
        model = args.model or _build(Path(stack.enter_context(tempfile.TemporaryDirectory())), args.shape)
        tokenizer_path = find_checkpoint(ScorerConfig(model=model)) / "tokenizer.json"
        pairs = make_pairs(tokenizer_path, args.num_pairs, args.seed)
        ids = _read_ids(tokenizer_path, pairs)
        contenders = list(_load_ours(stack, model, args.device, pairs))
        peers, missing = _load_peers(model, args.device, pairs, half=args.half_peers)
        contenders += peers
        logits, seen, positions = zip(*(_check(contender) for contender in contenders), strict=True)
        _measure(contenders, args.repeats)
    results = _summarize(contenders, ids, logits, seen, positions)
    score_std = statistics.pstdev(logits[0])
    problems = _find_problems(results, score_std)
    report = {
        "hardware": describe_hardware(args.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS}},
        "workload": {
            "model": args.model or f"{args.shape}, random weights",
            "device": args.device,
            "num_pairs": len(pairs),
            "num_tokens": sum(map(len, ids)),
            "median_tokens": statistics.median(map(len, ids)),
            "max_tokens": max(map(len, ids)),
            "repeats": args.repeats,
            "seed": args.seed,
        },
        "results": results,
        "score_std": score_std,
        "missing": missing,
        "problems": problems,
    }
    _print(report, results)
    return 1 if problems else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--shape", choices=SHAPES, default="base", help="random weights in this shape")
    models.add_argument("--model", help="checkpoint folder or hub id, instead of random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-pairs", type=int, help="default: 24 on a CPU, 200 on CUDA")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the passages; weights are always the same")
    parser.add_argument("--half-peers", action="store_true", help="run the peers in half precision as well")
    args = parser.parse_args(argv)
    if args.num_pairs is None:
        args.num_pairs = 200 if args.device.startswith("cuda") else 24
    if args.num_pairs < 2 or args.repeats < 1:
        parser.error("--num-pairs must be at least 2 and --repeats at least 1")
    return args


def _build(folder: Path, shape: str) -> str:
    return str(build_random_checkpoint(folder, vocab_size=VOCAB_SIZE, **SHAPES[shape]))


def _read_ids(tokenizer_path: Path, pairs: Pairs) -> list[Ids]:
    tokenizer = PairTokenizer(tokenizer_path, ScorerConfig())
    encoded = tokenizer.encode([query for query, _ in pairs], [passage for _, passage in pairs])
    return [tuple(pair.windows[0].tolist()) for pair in encoded]


def _load_ours(stack: ExitStack, model: str, device: str, pairs: Pairs) -> Iterator[Contender]:
    for dtype in get_args(DType):
        if dtype in ("float32", *_half_dtypes(device)):
            scorer = stack.enter_context(Scorer(model, device=device, dtype=dtype))
            score = partial(scorer.score, pairs)
            yield Contender(OURS, dtype, score, score)


def _load_peers(
    model: str, device: str, pairs: Pairs, *, half: bool
) -> tuple[list[Contender], dict[str, str]]:
    """Load what is installed; of the rest, say how to install it."""
    contenders: list[Contender] = []
    missing: dict[str, str] = {}
    dtypes = ["float32", *(_half_dtypes(device) if half else ())]
    for name, module, load in (
        (SENTENCE_TRANSFORMERS, "sentence_transformers", _load_cross_encoder),
        (FLAG_EMBEDDING, "FlagEmbedding", _load_flag_reranker),
    ):
        package, why_not = import_optional(module)
        if package is None:
            missing[name] = f"pip install {name}  ({why_not})"
        else:
            contenders += load(package, model, device, pairs, dtypes)
    return contenders, missing


def _load_cross_encoder(
    package: Any, model: str, device: str, pairs: Pairs, dtypes: Iterable[str]
) -> Iterator[Contender]:
    for dtype in dtypes:
        kwargs = {} if dtype == "float32" else {"model_kwargs": {"torch_dtype": getattr(torch, dtype)}}
        encoder = package.CrossEncoder(model, device=device, **kwargs)
        score = partial(encoder.predict, pairs)
        # By default it applies a sigmoid, behind which differences vanish.
        logits = partial(score, activation_fn=torch.nn.Identity())
        yield Contender(SENTENCE_TRANSFORMERS, dtype, score, logits, encoder.model)


def _load_flag_reranker(
    package: Any, model: str, device: str, pairs: Pairs, dtypes: Iterable[str]
) -> Iterator[Contender]:
    for dtype in dtypes:
        # It has no bfloat16, and stays in float32 on a CPU whatever it is told.
        if dtype == "bfloat16" or (dtype == "float16" and device == "cpu"):
            continue
        reranker = package.FlagReranker(model, use_fp16=dtype == "float16", devices=[device])
        score = partial(reranker.compute_score, pairs)
        yield Contender(FLAG_EMBEDDING, dtype, score, score, reranker.model)


def _half_dtypes(device: str) -> list[str]:
    """Return the half precisions that a device computes fast in."""
    if device.startswith("cuda"):
        return ["float16", "bfloat16"]
    return ["bfloat16"] if device == "cpu" and cpu_features("bf16") else []


def _check(contender: Contender) -> tuple[list[float], set[Ids], int]:
    """Run a contender once, untimed: its logits, the distinct sequences it read, positions computed."""
    if contender.module is None:
        return list(contender.logits()), set(), 0
    embedding: Any = contender.module.get_input_embeddings()
    seen: set[Ids] = set()
    positions = 0

    def record(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal positions
        positions += inputs[0].numel()
        seen.update(tuple(row[row != embedding.padding_idx].tolist()) for row in inputs[0])

    handle = embedding.register_forward_pre_hook(record)
    try:
        return list(map(float, contender.logits())), seen, positions
    finally:
        handle.remove()


def _measure(contenders: Sequence[Contender], repeats: int) -> None:
    """Time the contenders by turns, each repeat beginning with another, so that drift hits all alike."""
    for repeat in range(repeats):
        first = repeat % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            cpu, wall = time.process_time(), time.perf_counter()
            contender.score()
            contender.wall_s.append(time.perf_counter() - wall)
            contender.cpu_s.append(time.process_time() - cpu)


def _summarize(
    contenders: Sequence[Contender],
    ids: Sequence[Ids],
    logits: Sequence[Sequence[float]],
    seen: Sequence[set[Ids]],
    positions: Sequence[int],
) -> list[Result]:
    num_tokens = sum(map(len, ids))
    peers = {
        contender.name: (statistics.median(contender.wall_s), values)
        for contender, values in zip(contenders, logits, strict=True)
        if contender.name != OURS and contender.dtype == "float32"
    }
    results: list[Result] = []
    for contender, values, sequences, computed in zip(contenders, logits, seen, positions, strict=True):
        wall_s = statistics.median(contender.wall_s)
        is_ours = contender.module is None
        results.append(
            {
                "name": contender.name,
                "dtype": contender.dtype,
                "wall_s": wall_s,
                "cpu_s": statistics.median(contender.cpu_s),
                "tokens_per_s": num_tokens / wall_s,
                "tokens": num_tokens if is_ours else sum(map(len, sequences)),
                "positions": num_tokens if is_ours else computed,
                "same_ids": is_ours or sequences == set(ids),
                "times_as_fast_as": {peer: seconds / wall_s for peer, (seconds, _) in peers.items()},
                "max_difference": {
                    peer: max(abs(a - b) for a, b in zip(values, theirs, strict=True))
                    for peer, (_, theirs) in peers.items()
                },
                "wall_s_all": contender.wall_s,
            }
        )
    return results


def _find_problems(results: Sequence[Result], score_std: float) -> list[str]:
    problems = [
        f"{result['name']} read other token ids than {OURS}" for result in results if not result["same_ids"]
    ]
    if not score_std > MIN_SCORE_STD:
        problems.append(f"scores hardly vary (std {score_std:.3g}), so that their agreement says nothing")
    ours = next(result for result in results if (result["name"], result["dtype"]) == (OURS, "float32"))
    problems += [
        f"float32 differs from {peer} by {difference:.2e}, more than {MAX_FLOAT32_DIFFERENCE:.0e}"
        for peer, difference in ours["max_difference"].items()
        if not difference <= MAX_FLOAT32_DIFFERENCE
    ]
    return problems


def _print(report: dict[str, Any], results: Sequence[Result]) -> None:
    for title in ("hardware", "versions", "workload"):
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in report[title].items()))
    peers = list(results[0]["times_as_fast_as"])
    columns = ["wall s", "CPU s", "tokens/s", "positions"]
    print()
    _print_row("medians; how many times as fast", columns, peers)
    for result in results:
        figures = [f"{result['wall_s']:.3f}", f"{result['cpu_s']:.3f}", f"{result['tokens_per_s']:.0f}"]
        ratios = [f"{result['times_as_fast_as'][peer]:.2f}" for peer in peers]
        _print_row(f"{result['name']}, {result['dtype']}", [*figures, str(result["positions"])], ratios)
    print()
    _print_row("greatest difference of raw logits", [""] * len(columns), peers)
    for result in results:
        differences = [f"{result['max_difference'][peer]:.1e}" for peer in peers]
        _print_row(f"{result['name']}, {result['dtype']}", [""] * len(columns), differences)
    print(f"\nstandard deviation of the logits: {report['score_std']:.3f}")
    for peer, command in report["missing"].items():
        print(f"not compared: {peer}; {command}")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    print(json.dumps(report))


def _print_row(name: str, narrow: Sequence[str], wide: Sequence[str]) -> None:
    print(f"{name:34}" + "".join(f"{cell:>11}" for cell in narrow) + "".join(f"{cell:>23}" for cell in wide))


if __name__ == "__main__":
    sys.exit(main())
