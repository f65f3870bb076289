"""How pairs are put into batches: lengths in, batches out."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group sequences into batches that hold at most `max_batch_tokens` tokens.

    Sequences are taken longest first, so that neighbours in a batch are of like length, a batch that
    does not fit into memory shows at once, and progress only speeds up. Nothing is padded, so the sum
    of the lengths is exactly what a batch costs.

    Args:
        lengths: Tokens of each sequence, each at least 1.
        max_batch_tokens: Most tokens in one batch. A longer single sequence gets a batch of its own.

    Returns:
        Batches of indices into `lengths`; each index stands in exactly one, equal lengths in input
        order.

    Example:
        >>> plan_batches([3, 9, 4, 3], max_batch_tokens=10)
        [[1], [2, 0, 3]]
    """
    batches: list[list[int]] = []
    num_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or num_tokens + lengths[index] > max_batch_tokens:
            batches.append([])
            num_tokens = 0
        batches[-1].append(index)
        num_tokens += lengths[index]
    return batches
