"""Runs tests as on a processor with AMX: `python -m tests.support.amx_emulator LIBRARY [ARGUMENT OF PYTEST ...]`.

The kernels are compiled for AMX, and the library of `amx_emulator.c` executes the instructions of AMX. The
exit status is that of pytest, or 1 if no kernel used AMX or one has not released the tile registers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch
from llvmlite import binding

SOURCE = Path(__file__).with_suffix(".c")


def main(library: str, arguments: list[str]) -> int:
    features = binding.get_host_cpu_features()
    features.update({"amx-tile": True, "amx-bf16": True})
    # numba reads these when it is imported.
    os.environ["NUMBA_CPU_NAME"] = binding.get_host_cpu_name()
    os.environ["NUMBA_CPU_FEATURES"] = features.flatten()
    torch.cpu._is_amx_tile_supported = torch.cpu._init_amx = lambda: True
    emulator = ctypes.CDLL(library)
    emulator.count_products.restype = ctypes.c_long
    if emulator.emulate_amx() != 0:
        raise OSError("the handler of SIGILL cannot be set")
    # Python's fault handler would replace the handler of SIGILL.
    status = pytest.main(["-p", "no:faulthandler", "-p", "no:cacheprovider", *arguments])
    return int(status) or int(emulator.count_products() == 0 or emulator.is_configured())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
