"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

OnProgress = Callable[[int], object]


@contextmanager
def progress_bar() -> Iterator[tuple[OnProgress, OnProgress]]:
    """Show a bar. Yield two functions: one sets the total of the bar, one advances it.

    If stderr cannot be written to, there is no bar, and no error.
    """
    from tqdm.auto import tqdm

    try:
        bar = tqdm(desc="scoring", unit="pair", disable=sys.stderr is None)
    except Exception:  # of a closed file, a full disk, or a `sys.stderr` that the application has set
        bar = tqdm(disable=True)

    def set_total(num_pairs: int) -> None:
        bar.total = num_pairs
        with suppress(Exception):
            bar.refresh()

    def advance(num_pairs: int) -> None:
        with suppress(Exception):
            bar.update(num_pairs)

    try:
        yield set_total, advance
    finally:
        with suppress(Exception):
            bar.close()
