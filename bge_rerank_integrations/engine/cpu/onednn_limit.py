"""Which instructions oneDNN may use in this process.

oneDNN reads `ONEDNN_MAX_CPU_ISA`, or else `DNNL_MAX_CPU_ISA`, once, at its first use. It ignores a value that
it does not know. The kernels of this package that multiply pairs of bfloat16 follow the same limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# The first variable that is set counts.
_VARIABLES: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# All instruction sets that oneDNN knows and that do not multiply pairs of bfloat16 in vectors of 16.
_WITHOUT_PAIRS: Final = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)


def allows_amx(environment: Mapping[str, str]) -> bool:
    """Return whether oneDNN may use AMX under the limit that an environment sets.

    All instruction sets that oneDNN knows and that come before AMX begin with `SSE41` or `AVX`, and the names
    of all later ones contain `AMX`.

    Args:
        environment: Environment variables.

    Example:
        >>> allows_amx({}), allows_amx({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"})
        (True, False)
    """
    limit = _limit(environment)
    return "AMX" in limit or not limit.startswith(("SSE41", "AVX"))


def allows_pairs(environment: Mapping[str, str]) -> bool:
    """Return whether oneDNN may use the instructions of AVX-512 that multiply pairs of bfloat16.

    Args:
        environment: Environment variables.

    Example:
        >>> allows_pairs({}), allows_pairs({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"})
        (True, False)
    """
    return _limit(environment) not in _WITHOUT_PAIRS


def _limit(environment: Mapping[str, str]) -> str:
    return next((environment[name].upper() for name in _VARIABLES if environment.get(name)), "")
