"""Whether this process can multiply bfloat16 matrices with AMX instructions."""

from __future__ import annotations

import os

import torch

from bge_rerank_integrations.engine.cpu.onednn_limit import allows_amx


def has_amx() -> bool:
    """Return whether torch's bfloat16 products use AMX: the CPU, the kernel and oneDNN's limit allow it."""
    return (
        torch.backends.mkldnn.is_available()
        and allows_amx(os.environ)
        and bool(torch.cpu._is_amx_tile_supported())
        # Linux grants the large registers of AMX to a process only if it asks for them. A sandbox may refuse.
        and bool(torch.cpu._init_amx())
    )
