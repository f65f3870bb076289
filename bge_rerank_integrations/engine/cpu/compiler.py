"""How numba compiles the kernels of this folder, so that the machine needs no compiler.

The kernels start no threads, and they release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

from numba import njit

_OPTIONS: Final[dict[str, Any]] = {
    "nogil": True,
    "fastmath": True,
    "error_model": "numpy",
    "boundscheck": False,
}


@cache
def _sources() -> str:
    """Return a digest of every file that the kernels are compiled from: the Python files of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiled(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that compiles a function, and caches the result on disk if possible."""

    def compile_(function: Callable[..., None]) -> Any:
        try:
            # numba checks whether the file of a function has changed, but not the files that it imports from.
            function.__qualname__ = f"{function.__name__}_{_sources()}"
            return njit(signature, cache=True, **_OPTIONS)(function)
        except (OSError, RuntimeError):  # no source files, or no folder to write the cache to
            return njit(signature, **_OPTIONS)(function)

    return compile_


inlined = njit(inline="always")
