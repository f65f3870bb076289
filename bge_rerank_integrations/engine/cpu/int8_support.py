"""Checks whether this machine can multiply in int8, and how."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from bge_rerank_integrations.engine.cpu.llvm_features import host_features
from bge_rerank_integrations.engine.cpu.vector_support import HEAD_STEP, has_avx2
from bge_rerank_integrations.errors import DeviceError, UnsupportedCheckpointError, missing_extra
from bge_rerank_integrations.runtime.tracebacks import raise_if_of_signal_handler

_VNNI_FEATURES = ("avx512vnni", "avxvnni", "amx-int8")  # as LLVM calls them


def require_int8(head_dim: int) -> None:
    """Raise if this machine cannot run a model in int8.

    Args:
        head_dim: Width of the model's attention heads.

    Raises:
        MissingExtraError: numba is not installed.
        DeviceError: The CPU or this build of torch does not support int8 products.
        UnsupportedCheckpointError: The head dimension is not a multiple of 16.
    """
    if find_spec("numba") is None:
        raise missing_extra("int8", "numba")
    reason = int8_obstacle()
    if reason is not None:
        raise DeviceError(f"dtype 'int8' is not available: {reason}; use 'float32'")
    if head_dim % HEAD_STEP:
        raise UnsupportedCheckpointError(
            f"dtype 'int8' needs attention heads whose width is a multiple of {HEAD_STEP}, but this model's "
            f"are {head_dim} wide; use 'float32' or 'bfloat16'"
        )


def int8_obstacle() -> str | None:
    """Return why int8 products do not work on this machine; None if they work."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set, and its kernels must be compiled"
    if has_onednn_products() or _has_int16_products():
        return None
    if has_avx2():
        return "the settings of numba (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES) exclude AVX2"
    return "it needs an x86-64 CPU with AVX2 (Intel since 2013, AMD since 2015)"


@cache
def has_onednn_products() -> bool:
    """Return whether oneDNN multiplies int8 fast and correctly on this machine."""
    return (
        _has_vnni()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and _multiplies_correctly()
    )


def is_faster_in_int8() -> bool:
    """Return whether int8 is faster than float32 on this machine.

    Without VNNI, an instruction of AVX2 multiplies twice as many int16 values as another one multiplies
    floats. On processors with AVX-512, the instructions for floats are as fast.
    """
    return has_onednn_products() or (
        _has_int16_products() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


def _has_int16_products() -> bool:
    if find_spec("numba") is None:  # the extra `int8` is not installed, but might be worth installing
        return has_avx2()
    from bge_rerank_integrations.engine.cpu.compiler import HAS_AVX2  # this imports numba

    return HAS_AVX2


def _has_vnni() -> bool:
    if find_spec("llvmlite") is None:
        return bool(torch.cpu._is_vnni_supported())
    # Ask LLVM, since numba compiles for the features that LLVM detects, and not every torch reports them.
    features = host_features()
    return any(features.get(name) for name in _VNNI_FEATURES)


def _multiplies_correctly() -> bool:
    # The largest possible products: instructions older than VNNI would overflow.
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [16, 64])
    # oneDNN refuses scales of another type, and the default type of torch may be another one.
    ones, zeros = torch.ones(16, dtype=torch.float32), torch.zeros(16, dtype=torch.int32)
    try:
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except RuntimeError as error:
        raise_if_of_signal_handler(error)
        return False
    return bool((product == 255 * 127 * 64).all())
