"""Compare this package with sentence-transformers and FlagEmbedding on the same pairs, in one run.

    python -m benchmarks.compare [--shape base|large | --model FOLDER_OR_ID] [--device cpu|cuda]

`benchmarks/README.md` says what is compared and how to read it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict, get_args

import torch
from tokenizers import Tokenizer, decoders
from transformers.utils import logging as transformers_logging

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.config import NUM_SPECIAL_TOKENS, DType
from bge_rerank_integrations.engine.checkpoint import find_checkpoint
from bge_rerank_integrations.tokenization import PairTokenizer
from examples.random_checkpoint import build_random_checkpoint, read_texts

OURS: Final = "bge-rerank-integrations"
SENTENCE_TRANSFORMERS: Final = "sentence-transformers"
FLAG_EMBEDDING: Final = "FlagEmbedding"

MAX_LENGTH: Final = 512
MEDIAN_LENGTH: Final = 110
# Spreads the lengths as retrieved passages' are: a tenth is under 51 tokens, a tenth over 237.
LENGTH_SIGMA: Final = 0.6
NUM_QUERY_WORDS: Final = 8
MIN_PASSAGE_TOKENS: Final = 8

MAX_FLOAT32_DIFFERENCE: Final = 1e-4
MIN_SCORE_STD: Final = 0.1

SHAPES: Final[dict[str, dict[str, int]]] = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096},
}
VOCAB_SIZE: Final = 250_002
# What the tokenizer_config.json of the published checkpoints says, except for the class.
TOKENIZER_CONFIG: Final = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MAX_LENGTH,
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}

Pairs = list[tuple[str, str]]
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
    logits: Callable[[], Sequence[float]]
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
    with ExitStack() as stack:
        with _quiet():
            model = args.model or _build(Path(stack.enter_context(tempfile.TemporaryDirectory())), args.shape)
            tokenizer_path = find_checkpoint(ScorerConfig(model=model)) / "tokenizer.json"
            pairs = _make_pairs(tokenizer_path, args.num_pairs, args.seed)
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
        "hardware": _describe_hardware(args.device),
        "versions": _read_versions(),
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and warnings off the terminal; errors still come through as exceptions."""
    transformers_logging.disable_progress_bar()
    for name in ("transformers", "sentence_transformers", "FlagEmbedding"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _build(folder: Path, shape: str) -> str:
    """Write a random checkpoint whose tokenizer all contenders read alike."""
    build_random_checkpoint(folder, vocab_size=VOCAB_SIZE, **SHAPES[shape])
    # FlagReranker turns ids into text and back, and without a decoder pieces stay apart.
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(path)
    # Left to the model's type, transformers 5 builds an XLMRobertaTokenizer around the vocabulary and
    # drops the normalizer, unless that is SentencePiece's own.
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
    return str(folder)


def _make_pairs(tokenizer_path: Path, num_pairs: int, seed: int) -> Pairs:
    """Make one query and `num_pairs` passages of words from the example corpus, of log-normal length."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    words = [word for text in read_texts() for word in text.split() if "<" not in word]
    encodings = tokenizer.encode_batch(words, add_special_tokens=False)
    # Words are tokenized apart from each other, so their counts add up.
    counted = [
        (word, len(encoding.ids))
        for word, encoding in zip(words, encodings, strict=True)
        if encoding.ids and "<unk>" not in encoding.tokens
    ]
    rng = random.Random(seed)
    query = rng.sample(counted, NUM_QUERY_WORDS)
    taken = NUM_SPECIAL_TOKENS + sum(count for _, count in query)
    query_text = " ".join(word for word, _ in query)
    pairs = []
    for _ in range(num_pairs):
        length = min(round(rng.lognormvariate(math.log(MEDIAN_LENGTH), LENGTH_SIGMA)), MAX_LENGTH)
        pairs.append((query_text, _make_passage(rng, counted, max(length - taken, MIN_PASSAGE_TOKENS))))
    return pairs


def _make_passage(rng: random.Random, counted: Sequence[tuple[str, int]], num_tokens: int) -> str:
    chosen = []
    while num_tokens:
        word, count = rng.choice(counted)
        if count > num_tokens:
            fitting = [candidate for candidate in counted if candidate[1] <= num_tokens]
            if not fitting:
                break
            word, count = rng.choice(fitting)
        chosen.append(word)
        num_tokens -= count
    return " ".join(chosen)


def _read_ids(tokenizer_path: Path, pairs: Pairs) -> list[Ids]:
    tokenizer = PairTokenizer(tokenizer_path, ScorerConfig())
    encoded = tokenizer.encode([query for query, _ in pairs], [passage for _, passage in pairs])
    return [tuple(pair.windows[0].tolist()) for pair in encoded]


def _load_ours(stack: ExitStack, model: str, device: str, pairs: Pairs) -> Iterator[Contender]:
    for dtype in get_args(DType):
        if dtype in ("float32", *_half_dtypes(device)):
            scorer = stack.enter_context(Scorer(model, device=device, dtype=dtype))

            def score(scorer: Scorer = scorer) -> list[float]:
                return scorer.score(pairs)

            yield Contender(OURS, dtype, score, score)


def _load_peers(
    model: str, device: str, pairs: Pairs, *, half: bool
) -> tuple[list[Contender], dict[str, str]]:
    """Load what is installed; of the rest, say how to install it."""
    contenders: list[Contender] = []
    missing: dict[str, str] = {}
    dtypes = ["float32", *(_half_dtypes(device) if half else ())]
    for name, load in ((SENTENCE_TRANSFORMERS, _load_cross_encoder), (FLAG_EMBEDDING, _load_flag_reranker)):
        try:
            contenders += load(model, device, pairs, dtypes)
        except ImportError as error:
            missing[name] = f"pip install {name}  ({error})"
    return contenders, missing


def _load_cross_encoder(
    model: str, device: str, pairs: Pairs, dtypes: Iterable[str]
) -> Iterator[Contender]:
    package = importlib.import_module("sentence_transformers")
    for dtype in dtypes:
        kwargs = {} if dtype == "float32" else {"model_kwargs": {"torch_dtype": getattr(torch, dtype)}}
        encoder = package.CrossEncoder(model, device=device, **kwargs)

        def score(encoder: Any = encoder) -> object:
            return encoder.predict(pairs)

        def logits(encoder: Any = encoder) -> list[float]:
            values: list[float] = encoder.predict(pairs, activation_fn=torch.nn.Identity()).tolist()
            return values

        yield Contender(SENTENCE_TRANSFORMERS, dtype, score, logits, encoder.model)


def _load_flag_reranker(
    model: str, device: str, pairs: Pairs, dtypes: Iterable[str]
) -> Iterator[Contender]:
    package = importlib.import_module("FlagEmbedding")
    for dtype in dtypes:
        # It has no bfloat16, and stays in float32 on a CPU whatever it is told.
        if dtype == "bfloat16" or (dtype == "float16" and device == "cpu"):
            continue
        reranker = package.FlagReranker(model, use_fp16=dtype == "float16", devices=[device])

        def score(reranker: Any = reranker) -> list[float]:
            scores: list[float] = reranker.compute_score(pairs)
            return scores

        yield Contender(FLAG_EMBEDDING, dtype, score, score, reranker.model)


def _half_dtypes(device: str) -> list[str]:
    """Return the half precisions that a device computes fast in."""
    if device.startswith("cuda"):
        return ["float16", "bfloat16"]
    return ["bfloat16"] if device == "cpu" and _cpu_features("bf16") else []


def _cpu_features(*substrings: str) -> list[str]:
    read: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return sorted(name for name, has in read().items() if has is True and any(s in name for s in substrings))


def _check(contender: Contender) -> tuple[Sequence[float], set[Ids], int]:
    """Run a contender once, untimed: its logits, the distinct sequences it read, positions computed."""
    if contender.module is None:
        return contender.logits(), set(), 0
    embedding: Any = contender.module.get_input_embeddings()
    seen: set[Ids] = set()
    positions = 0

    def record(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal positions
        positions += inputs[0].numel()
        seen.update(tuple(row[row != embedding.padding_idx].tolist()) for row in inputs[0])

    handle = embedding.register_forward_pre_hook(record)
    try:
        return contender.logits(), seen, positions
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


def _describe_hardware(device: str) -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    description: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": _cpu_features("avx512_f", "bf16", "vnni", "amx"),
    }
    if device.startswith("cuda"):
        description["gpu"] = torch.cuda.get_device_name(device)
        description["cuda"] = torch.version.cuda
    return description


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _read_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", SENTENCE_TRANSFORMERS, FLAG_EMBEDDING):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _print(report: dict[str, Any], results: Sequence[Result]) -> None:
    for title in ("hardware", "versions", "workload"):
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in report[title].items()))
    peers = list(results[0]["times_as_fast_as"])
    print()
    header = f"{'':32}{'wall s':>9}{'CPU s':>9}{'tokens/s':>10}{'positions':>11}"
    print(header + "".join(f"{'x ' + peer:>25}" for peer in peers))
    for result in results:
        row = f"{result['name'] + ', ' + result['dtype']:32}{result['wall_s']:9.3f}{result['cpu_s']:9.3f}"
        row += f"{result['tokens_per_s']:10.0f}{result['positions']:11}"
        print(row + "".join(f"{result['times_as_fast_as'][peer]:25.2f}" for peer in peers))
    print(f"\n{'largest difference of raw logits':72}" + "".join(f"{peer:>24}" for peer in peers))
    for result in results:
        row = f"{result['name'] + ', ' + result['dtype']:72}"
        print(row + "".join(f"{result['max_difference'][peer]:24.1e}" for peer in peers))
    print(f"standard deviation of the logits: {report['score_std']:.3f}\n")
    for peer, command in report["missing"].items():
        print(f"not compared: {peer}; {command}")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
