"""The kernels for AMX, on machines without AMX: the emulator of `tests.support.amx_emulator` executes them.

On a machine with AMX, the other tests of this folder run these kernels.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bge_rerank_integrations.engine.cpu.amx import has_amx

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "support" / "amx_emulator.c"

pytestmark = [
    pytest.mark.skipif(find_spec("numba") is None, reason="needs numba (pip install numba)"),
    pytest.mark.skipif(has_amx(), reason="this machine has AMX, so that the other tests use it"),
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"),
        reason="the emulator is for Linux on x86-64",
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc) to build the emulator"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the emulator."""
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    return library


@pytest.mark.parametrize(
    "selected",
    [
        ["tests/engine/test_attention.py", "-k", "tiles"],
        ["tests/engine/test_int8.py", "-k", "attention_matches_torch and not without_pairs"],
        ["tests/engine/test_int8.py", "-k", "logits_are_near or do_not_change_int8"],
        ["tests/engine/test_engine.py", "-k", "bfloat16"],
    ],
    ids=["bfloat16", "int8", "int8-model", "bfloat16-model"],
)
def test_tests_of_attention_pass_on_an_emulated_amx(emulator: Path, selected: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.amx_emulator", str(emulator), "-q", *selected],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
