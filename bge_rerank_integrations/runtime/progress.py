"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[int], object]


@contextmanager
def progress_bar() -> Iterator[tuple[OnProgress, OnProgress]]:
    """Show a bar. Yield two functions: one sets the total of the bar, one advances it."""
    from tqdm.auto import tqdm

    with tqdm(desc="scoring", unit="pair") as bar:

        def set_total(num_pairs: int) -> None:
            bar.total = num_pairs
            bar.refresh()

        yield set_total, bar.update
