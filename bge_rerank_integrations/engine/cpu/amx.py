"""Whether this process can multiply bfloat16 matrices with AMX instructions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import torch

# oneDNN reads these variables once, at its first use. The first one that is set counts.
_LIMITS: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def has_amx() -> bool:
    """Return whether torch's bfloat16 products use AMX: the CPU, the kernel and oneDNN's limit allow it."""
    return (
        torch.backends.mkldnn.is_available()
        and allows_amx(os.environ)
        and bool(torch.cpu._is_amx_tile_supported())
        # Linux grants the large registers of AMX to a process only if it asks for them. A sandbox may refuse.
        and bool(torch.cpu._init_amx())
    )


def allows_amx(environment: Mapping[str, str]) -> bool:
    """Return whether oneDNN may use AMX under the limit that an environment sets.

    oneDNN ignores a value that it does not know. All instruction sets that it knows and that come before AMX
    begin with `SSE41` or `AVX`, and the names of all later ones contain `AMX`.

    Args:
        environment: Environment variables.

    Example:
        >>> allows_amx({}), allows_amx({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"})
        (True, False)
    """
    limit = next((environment[name].upper() for name in _LIMITS if environment.get(name)), "")
    return "AMX" in limit or not limit.startswith(("SSE41", "AVX"))
