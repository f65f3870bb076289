"""Whether this machine can multiply in int8, checked by doing it."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from bge_rerank_integrations.errors import DeviceError, UnsupportedCheckpointError, missing_extra

# Heads are worked on in vectors of so many floats.
HEAD_STEP = 16
_CPU_FEATURES = ("avx512vnni", "avxvnni", "amx-int8")  # as LLVM calls them


def require_int8(head_dim: int) -> None:
    """Return where int8 works.

    Raises:
        MissingExtraError: numba is not installed.
        DeviceError: The CPU, or this build of torch, cannot do it.
        UnsupportedCheckpointError: The model's heads have an odd width.
    """
    if find_spec("numba") is None:
        raise missing_extra("int8", "numba")
    reason = int8_obstacle()
    if reason is not None:
        raise DeviceError(f"dtype 'int8' is not available: {reason}; use 'float32' or 'bfloat16'")
    if head_dim % HEAD_STEP:
        raise UnsupportedCheckpointError(
            f"dtype 'int8' needs attention heads of a multiple of {HEAD_STEP}, and this model's are "
            f"{head_dim} wide; use 'float32' or 'bfloat16'"
        )


def int8_obstacle() -> str | None:
    """Return why int8 products do not work here; None where they do."""
    if not any(_host_cpu_features().get(name) for name in _CPU_FEATURES):
        return "it needs a CPU with VNNI instructions (x86 since about 2019)"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return f"torch {torch.__version__} comes without oneDNN's int8 products"
    return None if _multiplies_rightly() else f"int8 products of torch {torch.__version__} are wrong here"


def _host_cpu_features() -> dict[str, bool]:
    # numba compiles for what LLVM finds, and every release of torch can be used with it.
    from llvmlite import binding

    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on this platform
        return {}


def _multiplies_rightly() -> bool:
    # The greatest products there are: instructions older than VNNI would overflow.
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [16, 64])
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    try:
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except RuntimeError:
        return False
    return bool((product == 255 * 127 * 64).all())
