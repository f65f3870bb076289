"""Kendall's tau-b: how far two orders of the same things agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def tau_b(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of scores, NaN where either is all ties.

    Args:
        first: Scores of some things.
        second: Other scores of the same, in the same order.

    Example:
        >>> tau_b([1, 2, 3], [1, 3, 2])
        0.3333333333333333
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (first, second))
    if a.shape != b.shape:
        raise ValueError("the two lists are not of one length")
    upper = np.triu_indices(len(a), 1)
    signs_a, signs_b = (np.sign(scores[upper[0]] - scores[upper[1]]) for scores in (a, b))
    untied = math.sqrt(float(np.abs(signs_a).sum()) * float(np.abs(signs_b).sum()))
    return float((signs_a * signs_b).sum()) / untied if untied else math.nan
