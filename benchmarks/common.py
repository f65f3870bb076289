"""Helpers that the benchmarks share: generated pairs, hardware and versions."""

from __future__ import annotations

import heapq
import importlib.metadata
import io
import logging
import math
import platform
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer

from bge_rerank_integrations.config import NUM_SPECIAL_TOKENS
from bge_rerank_integrations.engine.cpu.cores import usable_cores
from examples.random_checkpoint import read_texts

MAX_LENGTH: Final = 512
MEDIAN_LENGTH: Final = 110
# Our assumption about retrieved passages: 10 % are shorter than 51 tokens, and 10 % are longer than 237.
LENGTH_SIGMA: Final = 0.6
NUM_QUERY_WORDS: Final = 8
MIN_PASSAGE_TOKENS: Final = 8
Pairs = list[tuple[str, str]]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and warnings. Errors are still raised as exceptions."""
    for name in ("transformers", "sentence_transformers", "FlagEmbedding"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class PairMaker:
    """Generates pairs with known numbers of tokens from the words of the example corpus.

    Args:
        tokenizer_path: The model's `tokenizer.json`. It must tokenize each word independently, so that token
            counts add up.
    """

    def __init__(self, tokenizer_path: Path) -> None:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        tokenizer.no_padding()
        words = [word for text in read_texts() for word in text.split() if "<" not in word]
        encodings = tokenizer.encode_batch(words, add_special_tokens=False)
        self._counted = [
            (word, len(encoding.ids))
            for word, encoding in zip(words, encodings, strict=True)
            if encoding.ids and "<unk>" not in encoding.tokens
        ]

    def pairs(
        self,
        num_pairs: int,
        seed: int,
        *,
        length: int | None = None,
        num_query_words: int = NUM_QUERY_WORDS,
    ) -> Pairs:
        """Generate one query and `num_pairs` passages, and return them as pairs.

        Args:
            num_pairs: Number of pairs.
            seed: Seed of the random generator.
            length: Number of tokens in each pair, including special tokens. None draws lengths from a
                log-normal distribution.
            num_query_words: Number of words in the query.

        Raises:
            ValueError: No query of so many words leaves room for a passage.
        """
        rng = random.Random(seed)
        query = rng.sample(self._counted, num_query_words)
        if length is not None:
            room = length - NUM_SPECIAL_TOKENS - MIN_PASSAGE_TOKENS
            if sum(heapq.nsmallest(num_query_words, (count for _, count in self._counted))) > room:
                raise ValueError(f"no query of {num_query_words} words fits into pairs of {length} tokens")
            while _num_tokens(query) > room:
                query = rng.sample(self._counted, num_query_words)
        taken = NUM_SPECIAL_TOKENS + _num_tokens(query)
        text = " ".join(word for word, _ in query)
        return [
            (text, self._passage(rng, max((length or _log_normal(rng)) - taken, MIN_PASSAGE_TOKENS)))
            for _ in range(num_pairs)
        ]

    def _passage(self, rng: random.Random, num_tokens: int) -> str:
        chosen = []
        while num_tokens:
            word, count = rng.choice(self._counted)
            if count > num_tokens:
                fitting = [candidate for candidate in self._counted if candidate[1] <= num_tokens]
                if not fitting:
                    break
                word, count = rng.choice(fitting)
            chosen.append(word)
            num_tokens -= count
        return " ".join(chosen)


def _num_tokens(words: list[tuple[str, int]]) -> int:
    return sum(count for _, count in words)


def reworded(pairs: Pairs, seed: str) -> Pairs:
    """Shuffle the words of each passage: the number of tokens is unchanged, but no cache has the text."""
    rng = random.Random(seed)
    shuffled = []
    for query, passage in pairs:
        words = passage.split()
        rng.shuffle(words)
        shuffled.append((query, " ".join(words)))
    return shuffled


def describe_hardware(device: str) -> dict[str, Any]:
    """Return a description of the hardware that the benchmark runs on."""
    description: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": usable_cores().num_cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": cpu_features("avx512_f", "bf16", "vnni", "amx"),
    }
    if device.startswith("cuda"):
        description["gpu"] = torch.cuda.get_device_name(device)
        description["cuda"] = torch.version.cuda
    return description


def version(distribution: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_features(*substrings: str) -> list[str]:
    """Return the CPU features known to torch whose names contain one of the given strings."""
    read: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return sorted(name for name, has in read().items() if has is True and any(s in name for s in substrings))


def _log_normal(rng: random.Random) -> int:
    return min(round(rng.lognormvariate(math.log(MEDIAN_LENGTH), LENGTH_SIGMA)), MAX_LENGTH)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    # On virtual machines, the model name alone does not identify the CPU generation.
    found = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.*)$", path.read_text(encoding="utf-8"), re.M)
    )
    if "model name" not in found:
        return platform.machine()
    return ", ".join(
        [found["model name"], *(f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)]
    )


def spread(pairs: Pairs, count: int) -> Pairs:
    """Return at most `count` pairs, spaced evenly over the list."""
    step = max(len(pairs) // count, 1)
    return pairs[::step][:count]
