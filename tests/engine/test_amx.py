"""The kernels for AMX, on machines without AMX: the emulator of `tests.support.amx_emulator` executes them.

On a machine with AMX, the other tests of this folder run these kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bge_rerank_integrations.engine.cpu.amx import has_amx
from bge_rerank_integrations.engine.cpu.int8_support import int8_obstacle

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "support" / "amx_emulator.c"


def _has_avx512_bf16() -> bool:
    if find_spec("numba") is None:
        return False
    from bge_rerank_integrations.engine.cpu.llvm_features import host_features

    return bool(host_features().get("avx512bf16"))


pytestmark = [
    pytest.mark.skipif(has_amx(), reason="this machine has AMX, so that the other tests use it"),
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"),
        reason="the emulator is for Linux on x86-64",
    ),
    pytest.mark.skipif(not _has_avx512_bf16(), reason="needs numba and a CPU with AVX-512 BF16"),
]
needs_int8 = pytest.mark.skipif(int8_obstacle() is not None, reason="int8 is not available")
# The children must not inherit a limit that excludes AMX.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in LIMITS}
TILES = ["tests/engine/test_attention.py", "-k", "tiles"]
INT8 = ["tests/engine/test_int8.py", "-k", "test_int8_attention_matches_torch"]
INT8_MODEL = ["tests/engine/test_int8.py", "-k", "logits_are_near or do_not_change_int8"]
BFLOAT16_MODEL = ["tests/engine/test_engine.py", "-k", "bfloat16"]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the emulator."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler (cc) to build the emulator")
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    return library


@pytest.mark.parametrize(
    "selected",
    [
        pytest.param(TILES, id="bfloat16"),
        pytest.param(INT8, id="int8", marks=needs_int8),
        pytest.param(INT8_MODEL, id="int8-model", marks=needs_int8),
        pytest.param(BFLOAT16_MODEL, id="bfloat16-model"),
    ],
)
def test_tests_of_attention_pass_on_an_emulated_amx(emulator: Path, selected: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.amx_emulator", str(emulator), "-q", *selected],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("+avx512f,+avx512bf16,+amx-tile,+amx-bf16", "True True"),
        ("+avx512f,+amx-tile,+amx-bf16", "False False"),
        ("+avx2", "False False"),
    ],
)
def test_features_that_numba_excludes_are_not_used(features: str, expected: str) -> None:
    """LLVM would end the process if it met an instruction that it may not use."""
    code = (
        "import torch; torch.cpu._is_amx_tile_supported = torch.cpu._init_amx = lambda: True; "
        "from bge_rerank_integrations.engine.cpu.compiler import HAS_AMX, HAS_PAIRS; print(HAS_AMX, HAS_PAIRS)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**ENVIRONMENT, "NUMBA_CPU_FEATURES": features},
    )
    assert run.stdout.strip() == expected
