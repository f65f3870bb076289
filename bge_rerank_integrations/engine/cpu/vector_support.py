"""Which vector instructions of this processor the kernels of this package may use."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Final

import torch

from bge_rerank_integrations.engine.cpu.llvm_features import host_features
from bge_rerank_integrations.engine.cpu.onednn_limit import allows_pairs

HEAD_STEP: Final = 16
"""Attention kernels whose products are in float32 process a head in vectors of this many floats."""
PAIRS_STEP: Final = 2 * HEAD_STEP
"""Attention kernels whose products are in bfloat16 process a head in vectors of this many values."""


def has_avx2() -> bool:
    """Return whether torch uses AVX2 on this machine, alone or with AVX-512."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def has_fast_tiles() -> bool:
    """Return whether this package multiplies floats faster than oneDNN does, on a processor with AVX-512.

    This was measured on AMD's Zen 4 (benchmarks/LOG.md, 50). Others with AVX-512 have not been measured. The
    answer is also false without llvmlite, which numba needs.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_name() == "znver4"


def has_fast_pairs() -> bool:
    """Return whether one instruction multiplies twice as many bfloat16 values as floats.

    This is true of AMD's processors since Zen 4. On an Intel processor with the same instructions and without
    AMX, products in bfloat16 took twice as long as in float32 (benchmarks/LOG.md, 10). The answer is also
    false without llvmlite, which numba needs.
    """
    is_zen = allows_pairs(os.environ) and _cpu_name().startswith("znver")
    return is_zen and bool(host_features().get("avx512bf16"))


def _cpu_name() -> str:
    """Return LLVM's name of this processor's generation, or an empty string without llvmlite."""
    if find_spec("llvmlite") is None:
        return ""
    from llvmlite import binding

    name: str = binding.get_host_cpu_name()
    return name
