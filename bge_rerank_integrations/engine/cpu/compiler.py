"""How numba compiles the kernels of this folder, so that the machine needs no compiler.

The kernels start no threads, and they release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

from numba import config, njit
from numba.core.codegen import get_host_cpu_features

from bge_rerank_integrations.engine.cpu.amx import has_amx
from bge_rerank_integrations.engine.cpu.vector_support import has_fast_pairs

_OPTIONS: Final[dict[str, Any]] = {
    "nogil": True,
    "fastmath": True,
    "error_model": "numpy",
    "boundscheck": False,
}


def compiles_for(feature: str) -> bool:
    """Return whether numba compiles for a feature of the processor, by the name that LLVM gives it.

    Settings of numba can exclude features. An instruction of an excluded feature would end the process.
    """
    features: str | None = getattr(config, "CPU_FEATURES", None)
    return f"+{feature}" in (get_host_cpu_features() if features is None else features).split(",")


# All kernels with pairs round by an instruction of AVX-512 BF16.
_ROUNDS_PAIRS: Final = compiles_for("avx512bf16")
HAS_AMX: Final = has_amx() and _ROUNDS_PAIRS and compiles_for("amx-bf16")
"""Whether kernels multiply pairs of bfloat16 on AMX; see `amx_products`."""
HAS_AVX2: Final = compiles_for("avx2")
"""Whether kernels use vectors of AVX2; see `int16_products` and `float32_products`."""
HAS_PAIRS: Final = HAS_AMX or (has_fast_pairs() and _ROUNDS_PAIRS)
"""Whether kernels multiply pairs of bfloat16, on AMX or by vectors; see `bfloat16_pairs`."""


@cache
def _sources() -> str:
    """Return a digest of what the kernels are compiled from: this folder, and the constants above."""
    digest = hashlib.sha256(repr((HAS_AMX, HAS_PAIRS)).encode())
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
