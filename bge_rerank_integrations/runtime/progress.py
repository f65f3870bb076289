"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

OnProgress = Callable[[int], object]

# What writing to stderr raises if it is closed or full. A bar that cannot be shown must not fail the request.
_CANNOT_WRITE = (OSError, ValueError)


@contextmanager
def progress_bar() -> Iterator[tuple[OnProgress, OnProgress]]:
    """Show a bar. Yield two functions: one sets the total of the bar, one advances it."""
    from tqdm.auto import tqdm

    try:
        bar = tqdm(desc="scoring", unit="pair", disable=sys.stderr is None)
    except _CANNOT_WRITE:
        bar = tqdm(disable=True)

    def set_total(num_pairs: int) -> None:
        bar.total = num_pairs
        with suppress(*_CANNOT_WRITE):
            bar.refresh()

    def advance(num_pairs: int) -> None:
        with suppress(*_CANNOT_WRITE):
            bar.update(num_pairs)

    try:
        yield set_total, advance
    finally:
        with suppress(*_CANNOT_WRITE):
            bar.close()
