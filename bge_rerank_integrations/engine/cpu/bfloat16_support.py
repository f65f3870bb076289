"""Whether the processor multiplies pairs of bfloat16 fast."""

from __future__ import annotations

import os
from importlib.util import find_spec

from bge_rerank_integrations.engine.cpu.llvm_features import host_features
from bge_rerank_integrations.engine.cpu.onednn_limit import allows_pairs


def has_fast_pairs() -> bool:
    """Return whether one instruction multiplies twice as many bfloat16 values as floats.

    This is true of AMD's processors since Zen 4. On an Intel processor with the same instructions and without
    AMX, products in bfloat16 took twice as long as in float32 (benchmarks/LOG.md, 10). The answer is also
    false without llvmlite, which numba needs.
    """
    if not allows_pairs(os.environ) or find_spec("llvmlite") is None:
        return False
    from llvmlite import binding

    return bool(host_features().get("avx512bf16")) and binding.get_host_cpu_name().startswith("znver")
