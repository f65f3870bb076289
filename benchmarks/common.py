"""What the benchmarks share: the pairs, and what they ran on."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import math
import os
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
from examples.random_checkpoint import read_texts

MAX_LENGTH: Final = 512
MEDIAN_LENGTH: Final = 110
# Our assumption of how retrieved passages spread: a tenth under 51 tokens, a tenth over 237.
LENGTH_SIGMA: Final = 0.6
NUM_QUERY_WORDS: Final = 8
MIN_PASSAGE_TOKENS: Final = 8
Pairs = list[tuple[str, str]]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and warnings off the terminal; errors still come through as exceptions."""
    for name in ("transformers", "sentence_transformers", "FlagEmbedding"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class PairMaker:
    """Makes pairs of words from the example corpus, with known numbers of tokens.

    Args:
        tokenizer_path: Of the model; words are tokenized apart from each other, so their counts add up.
    """

    def __init__(self, tokenizer_path: Path) -> None:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
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
        """Make one query and `num_pairs` passages.

        Args:
            num_pairs: How many.
            seed: The same pairs for the same seed.
            length: Tokens of each pair, special ones included; None is log-normal.
            num_query_words: Words of the query.
        """
        rng = random.Random(seed)
        query = rng.sample(self._counted, num_query_words)
        taken = NUM_SPECIAL_TOKENS + sum(count for _, count in query)
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


def reworded(pairs: Pairs, seed: str) -> Pairs:
    """Return pairs with the words of each passage in another order: as many tokens, but in no cache."""
    rng = random.Random(seed)
    shuffled = []
    for query, passage in pairs:
        words = passage.split()
        rng.shuffle(words)
        shuffled.append((query, " ".join(words)))
    return shuffled


def import_optional(module: str) -> tuple[Any, str]:
    """Import a package that may not be there; None and the reason if it is not."""
    try:
        return importlib.import_module(module), ""
    except ImportError as error:
        return None, str(error)


def describe_hardware(device: str) -> dict[str, Any]:
    """Return what a benchmark ran on."""
    affinity = getattr(os, "sched_getaffinity", None)
    description: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": cpu_features("avx512_f", "bf16", "vnni", "amx"),
    }
    if device.startswith("cuda"):
        description["gpu"] = torch.cuda.get_device_name(device)
        description["cuda"] = torch.version.cuda
    return description


def version(distribution: str) -> str:
    """Return the version of an installed package, or that it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_features(*substrings: str) -> list[str]:
    """Return the names of the CPU's features that contain one of some strings, as torch knows them."""
    read: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return sorted(name for name, has in read().items() if has is True and any(s in name for s in substrings))


def _log_normal(rng: random.Random) -> int:
    return min(round(rng.lognormvariate(math.log(MEDIAN_LENGTH), LENGTH_SIGMA)), MAX_LENGTH)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    # The name alone does not tell generations apart on virtual machines.
    found = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.*)$", path.read_text(encoding="utf-8"), re.M)
    )
    return ", ".join(f"{key} {found[key]}" for key in sorted(found, reverse=True)) or platform.machine()


def spread(pairs: Pairs, count: int) -> Pairs:
    """Return at most so many pairs, as far apart as can be: of all queries and lengths."""
    step = max(len(pairs) // count, 1)
    return pairs[::step][:count]
