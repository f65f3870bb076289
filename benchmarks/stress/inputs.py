"""Figures 8, 9 and 10: scores that are not finite, passages of every length, and malformed inputs."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

from benchmarks.stress.common import (
    MAX_DIFFERENCE,
    PATIENCE_S,
    Bench,
    Outcome,
    difference,
    overflowing_checkpoint,
)
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import InputTypeError, NonFiniteScoreError
from bge_rerank_integrations.text.pairs import PreparedPairs


def scores_not_finite(bench: Bench) -> Outcome:
    """Check that only requests with an overflowing word fail, and that no score is NaN or infinite."""
    folder, word_id = overflowing_checkpoint(bench, "panda")
    tokenizer = bench.tokenizer()
    phrases = bench.phrases()
    encoded = tokenizer.encode([""] * len(phrases), phrases)
    good = [text for text, pair in zip(phrases, encoded, strict=True) if word_id not in pair.windows[0]]
    num_requests = bench.count(1000)
    rng = random.Random(6)
    bad = set(rng.sample(range(10 * num_requests), bench.count(100)))
    requests = [
        [f"panda {text}" if 10 * n + at in bad else text for at, text in enumerate(rng.sample(good, 10))]
        for n in range(num_requests)
    ]
    with Scorer(folder, device="cpu") as scorer:

        def end(n: int) -> str:
            first = next((at for at in range(10) if 10 * n + at in bad), None)
            try:
                ranking = scorer.rank("query", requests[n])
            except NonFiniteScoreError as error:
                return "refused" if first is not None and error.index == first else "wrong"
            return "finite" if first is None and _is_finite(p.score for p in ranking) else "wrong"

        with ThreadPoolExecutor(8) as pool:
            tally = Counter(pool.map(end, range(num_requests)))
    num_injected, num_missed = _injected_logits(bench)
    return Outcome(
        tally["wrong"] == 0 and num_missed == 0,
        f"{10 * num_requests} scores, {len(bad)} NaN: {tally['refused']} requests failed as expected, "
        f"{tally['finite']} have finite scores, {tally['wrong']} wrong; {num_missed} of {num_injected} "
        "injected NaN and infinite logits missed",
    )


def _injected_logits(bench: Bench) -> tuple[int, int]:
    """Put logits that are not finite into results. Return how many, and how many were not detected."""
    rng = random.Random(7)
    prepared = PreparedPairs([("query", bench.phrases()[:100])])
    list(prepared.encode(bench.tokenizer(), repeat(100)))
    num_missed = 0
    for number in range(bench.count(100)):
        logits = [rng.uniform(-9, 9) for _ in range(100)]
        at = rng.randrange(100)
        logits[at] = (math.nan, math.inf, -math.inf)[number % 3]
        try:
            prepared.scores(logits, normalize=number % 2 == 0)
            num_missed += 1
        except NonFiniteScoreError as error:
            num_missed += error.index != at
    return bench.count(100), num_missed


def every_length(bench: Bench) -> Outcome:
    """Check that passages of every length fit a model with 514 positions and that cuts are reported."""
    lengths = range(1, 601)
    rankings = bench.scorer.rank_many([("a", ["a " * length]) for length in lengths])
    num_wrong = sum(
        ranking.num_tokens != min(length + 5, 512) or ranking[0].truncated != (length + 5 > 512)
        for length, ranking in zip(lengths, rankings, strict=True)
    )
    longest = max(ranking.num_tokens for ranking in rankings)
    num_truncated = sum(ranking.num_truncated for ranking in rankings)
    return Outcome(
        num_wrong == 0 and _is_finite(ranking[0].score for ranking in rankings),
        f"600 lengths: at most {longest} tokens, {num_truncated} reported truncated, {num_wrong} wrong",
    )


def malformed_inputs(bench: Bench) -> Outcome:
    """Check that odd texts get scores, that other types are refused by index, and other pairs score right."""
    rng = random.Random(8)
    num_inputs = bench.count(1000)
    good = [("panda", "a bear"), ("query", bench.texts[0])]
    expected = bench.scorer.score(good)
    tally: Counter[str] = Counter()
    for number in range(num_inputs):
        odd, at = _odd_input(rng, number), rng.randrange(3)
        pair = (odd, "passage") if number % 3 == 0 else ("query", odd)
        pairs = [*good[:at], pair, *good[at:]]
        try:
            scores = bench.scorer.score(pairs, timeout=PATIENCE_S)
            own = scores.pop(at)
            is_right = isinstance(odd, str) and math.isfinite(own)
            tally["scored" if is_right and difference(scores, expected) <= MAX_DIFFERENCE else "wrong"] += 1
        except InputTypeError as error:
            tally["refused" if not isinstance(odd, str) and error.index == at else "wrong"] += 1
        except Exception:
            tally["wrong"] += 1
    return Outcome(
        tally["wrong"] == 0,
        f"{num_inputs} inputs: {tally['scored']} finite scores, {tally['refused']} refused by index, "
        f"{tally['wrong']} wrong",
    )


def _odd_input(rng: random.Random, number: int) -> Any:
    """Return a text that is hard to tokenize, or a value that is not a string."""
    if number % 50 == 0:  # ten million characters
        unit = rng.choice(["x", "a ", " ", "熊", "\0", "\ud800", "x" * 5000 + " "])
        return unit * (10_000_000 // len(unit))
    if number % 5 == 1:
        return rng.choice(
            [None, 3, 0.5, math.nan, b"bytes", ["text"], {"text": 1}, ("a", "b"), True, object()]
        )
    length = 100_000 if number % 20 == 2 else rng.randrange(200)
    first, last = rng.choice(
        [
            (0xD800, 0xDFFF),
            (0, 31),
            (0, 0x10FFFF),
            (0x0300, 0x036F),
            (0x202A, 0x202E),
            (0x1F300, 0x1FAFF),
            (0, 0),
        ]
    )
    text = "".join(chr(rng.randint(first, last)) for _ in range(length))
    return text + rng.choice(["", "</s>", "<s><pad></s></s>", "<mask>", "\ufeff", " \r\n"])


def _is_finite(scores: Iterable[float]) -> bool:
    return all(map(math.isfinite, scores))
