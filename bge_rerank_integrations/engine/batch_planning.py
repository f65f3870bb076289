"""Groups sequences into batches by their lengths."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group sequences into batches that hold at most `max_batch_tokens` tokens.

    The longest sequences come first. This puts sequences of similar length into the same batch, shows in the
    first batch whether memory suffices, and makes progress faster towards the end. Batches are not padded, so
    the cost of a batch is the sum of its lengths.

    Args:
        lengths: Number of tokens of each sequence, at least 1.
        max_batch_tokens: Most tokens in one batch. A single sequence that is longer gets its own batch.

    Returns:
        Batches of indices into `lengths`. Each index is in exactly one batch. Sequences of equal length keep
        their input order.

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
