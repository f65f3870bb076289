"""The features of the processor, as LLVM detects them for numba."""

from __future__ import annotations

from collections.abc import Mapping


def host_features() -> Mapping[str, bool]:
    """Return whether the processor has each feature, by LLVM's name. This needs llvmlite.

    The result is empty on platforms where LLVM cannot detect the features.
    """
    from llvmlite import binding

    try:
        features: Mapping[str, bool] = binding.get_host_cpu_features()
    except RuntimeError:
        return {}
    return features
