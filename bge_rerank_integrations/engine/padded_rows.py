"""The numbers of rows to which inputs of oneDNN are padded, so that it compiles few kernels."""

from __future__ import annotations


def round_up_rows(num_rows: int, *, num_in_octave: int = 8) -> int:
    """Round a number of rows up to one of a few sizes.

    Args:
        num_rows: The number of rows, at least 1.
        num_in_octave: Number of sizes between a power of two and the next one. Sizes are at least 16 apart.

    Returns:
        The smallest of the sizes that is at least `num_rows`.

    Example:
        >>> [round_up_rows(n) for n in (1, 100, 300, 1100)]
        [16, 112, 320, 1152]
    """
    step = max(16, (1 << (num_rows - 1).bit_length()) // (2 * num_in_octave))
    return -(-num_rows // step) * step
