"""Known scores of published models, to verify that this machine computes the same scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from bge_rerank_integrations.config import EMBEDDED_MODEL
from bge_rerank_integrations.errors import InputError
from bge_rerank_integrations.scorer import Scorer

_PANDA: Final = (
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear "
    "species endemic to China."
)
_HI_PAIR: Final = ("what is panda?", "hi")
_PANDA_PAIR: Final = ("what is panda?", _PANDA)

# This file contains the scores that `bge-rerank check --model embedded --dtype float32 --json` prints.
_GOLDEN_FILE: Final = Path(__file__).parents[1] / "embedded" / "golden.json"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Scores that a model should give.

    Attributes:
        source: Where the scores were published.
        tolerance: Largest rounding error of the published scores, in logits.
        logits: Maps a (query, passage) pair to its raw logit.
    """

    source: str
    tolerance: float
    logits: Mapping[tuple[str, str], float]


# Scores computed in float16 on other hardware differ by a few hundredths. A wrong tokenizer or layer changes
# them by whole units.
_FLOAT16_TOLERANCE: Final = 0.1

_README: Final = "FlagEmbedding's README; computed in float16"
PUBLISHED: Final[dict[str, Reference]] = {
    "BAAI/bge-reranker-base": Reference(
        source="a user's report in FlagEmbedding's issue tracker (issue 108), not its README",
        tolerance=_FLOAT16_TOLERANCE,
        logits={_HI_PAIR: -8.154, _PANDA_PAIR: 6.182},
    ),
    "BAAI/bge-reranker-large": Reference(
        source=_README,
        tolerance=_FLOAT16_TOLERANCE,
        logits={("query", "passage"): -1.5263671875, _HI_PAIR: -5.60546875, _PANDA_PAIR: 5.76171875},
    ),
    "BAAI/bge-reranker-v2-m3": Reference(
        source=_README,
        tolerance=_FLOAT16_TOLERANCE,
        logits={("query", "passage"): -5.65234375, _HI_PAIR: -8.1875, _PANDA_PAIR: 5.26171875},
    ),
}
"""Maps a model's hub id to its published scores."""

DTYPE_TOLERANCE: Final[Mapping[str, float]] = {
    "float32": 0.001,
    "float16": 0.02,
    "bfloat16": 0.1,
    "int8": 0.3,
    "float8": 0.6,
}
"""Largest rounding error of each precision, in logits."""


class Check(NamedTuple):
    """The expected and the computed score of one pair.

    Attributes:
        query: The query.
        passage: The passage.
        expected: The reference's raw logit.
        score: The raw logit computed here.
        tolerance: Largest difference between the two that rounding explains.
    """

    query: str
    passage: str
    expected: float
    score: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the two scores differ by no more than the tolerance."""
        return abs(self.expected - self.score) <= self.tolerance


def require_reference(name: str) -> Reference:
    """Return the scores that a model should give.

    Args:
        name: A hub id, or `embedded`.

    Raises:
        InputError: No scores are known for this model.
    """
    if name == EMBEDDED_MODEL:
        return _read_golden()
    if name not in PUBLISHED:
        raise InputError(
            f"no scores are known for {name!r}, only for {', '.join([*PUBLISHED, EMBEDDED_MODEL])}. To check "
            "a local copy of one of these models, add `--as MODEL`"
        )
    return PUBLISHED[name]


def check_scores(scorer: Scorer, reference: Reference, dtype: str) -> list[Check]:
    """Score the pairs of a reference and compare the scores.

    Args:
        scorer: The scorer to check. It must return raw logits.
        reference: The expected scores.
        dtype: The precision that the scorer computes in, such as `float32`. `auto` is not allowed.
    """
    tolerance = reference.tolerance + DTYPE_TOLERANCE[dtype]
    scores = scorer.score(list(reference.logits))
    return [
        Check(*pair, expected, score, tolerance)
        for (pair, expected), score in zip(reference.logits.items(), scores, strict=True)
    ]


def _read_golden() -> Reference:
    """Read the embedded model's expected scores."""
    golden = json.loads(_GOLDEN_FILE.read_text(encoding="utf-8"))
    return Reference(
        source=f"recorded by this package, computed in {golden['dtype']} on a CPU",
        tolerance=0.0,
        logits={(pair["query"], pair["passage"]): pair["score"] for pair in golden["pairs"]},
    )
