"""Scores that are published for known models, to tell whether this machine computes the same."""

from __future__ import annotations

from typing import Final, NamedTuple

from bge_rerank_integrations.errors import InputError
from bge_rerank_integrations.scorer import Scorer

_PANDA: Final = (
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear "
    "species endemic to China."
)
PAIRS: Final = (("query", "passage"), ("what is panda?", "hi"), ("what is panda?", _PANDA))
PUBLISHED: Final[dict[str, tuple[float, float, float]]] = {
    # FlagEmbedding's README, raw, computed there in float16
    "BAAI/bge-reranker-large": (-1.5263671875, -5.60546875, 5.76171875),
    "BAAI/bge-reranker-v2-m3": (-5.65234375, -8.1875, 5.26171875),
}
"""Model to the raw logits of `PAIRS`."""

TOLERANCE: Final = 0.1
"""Half precision on other hardware is off by some hundredths; a wrong tokenizer or layer by whole units."""


class Check(NamedTuple):
    """One pair's score, here and as published."""

    query: str
    passage: str
    published: float
    score: float

    @property
    def agrees(self) -> bool:
        """Whether the two are the same but for rounding."""
        return abs(self.published - self.score) <= TOLERANCE


def require_published(name: str) -> tuple[float, float, float]:
    """Return the published logits of a model.

    Raises:
        InputError: There are none.
    """
    if name not in PUBLISHED:
        raise InputError(
            f"no scores are published for {name!r}; they are for {', '.join(PUBLISHED)}. A local copy of one "
            "of those is checked with --as NAME"
        )
    return PUBLISHED[name]


def check_published(scorer: Scorer, name: str) -> list[Check]:
    """Score the published pairs of a model with a scorer that gives raw logits.

    Args:
        scorer: The model to check.
        name: Whose scores it should give.

    Raises:
        InputError: None are published for that name.
    """
    expected = require_published(name)
    scores = scorer.score(PAIRS)
    return [
        Check(*pair, published, score) for pair, published, score in zip(PAIRS, expected, scores, strict=True)
    ]
