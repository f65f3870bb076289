"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, ClassVar
from weakref import WeakSet

from bge_rerank_integrations.runtime.locks import SafeLock

OnProgress = Callable[[int], object]


@contextmanager
def progress_bar() -> Iterator[tuple[OnProgress, OnProgress]]:
    """Show a bar. Yield two functions: one sets the total of the bar, one advances it.

    If stderr cannot be written to, there is no bar, and no error.
    """
    make_bar = _bar_class()
    try:
        bar = make_bar(desc="scoring", unit="pair", disable=sys.stderr is None)
    except Exception:  # of a closed file, a full disk, or a `sys.stderr` that the application has set
        bar = make_bar(disable=True)

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


@cache
def _bar_class() -> Any:
    """Return a class of bars. It is created at the first call, because it imports tqdm."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """A bar that cannot stop another thread.

        All bars of an application share tqdm's lock. `refresh` of tqdm leaves it taken if the bar cannot be
        drawn, or if Ctrl-C interrupts it. Every other thread that shows a bar then waits for ever.
        """

        _lock = SafeLock()
        _instances: ClassVar[WeakSet[Any]] = WeakSet()
        monitor_interval = 0  # no thread that redraws slow bars

        def refresh(self, *_: Any, **__: Any) -> None:
            with self._lock:
                super().refresh(nolock=True)

        def display(self, *args: Any, **kwargs: Any) -> None:
            with suppress(Exception):
                super().display(*args, **kwargs)

    return Bar
