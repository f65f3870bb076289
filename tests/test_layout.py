"""The house rules that a reader cannot check at a glance: who imports whom, and when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bge_rerank_integrations

PACKAGE = Path(bge_rerank_integrations.__file__).parent

# Bottom to top: a file imports only from rows above its own.
ROOMS = [
    "errors",
    "runtime.shutdown",
    "runtime.tracebacks",
    "config",
    "validation",
    "ranking",
    "text.token_cache",
    "text.tokenization",
    "text.pairs",
    "batching.queue",
    "batching.stats",
    "runtime.warn_once",
    "runtime.fork_guard",
    "batching.batcher",
    "engine.batch_planning",
    "engine.cpu.first_calls",
    "engine.packing",
    "engine.linear",
    "engine.attention",
    "engine.blocks",
    "engine.cuda.triton_kernels",
    "engine.cuda.fused_ops",
    "engine.cuda.float8",
    "engine.cuda.graphs",
    "engine.cuda.transfer",
    "engine.model",
    "engine.checkpoint.mistaken_folders",
    "engine.checkpoint.checkpoint",
    "engine.checkpoint.prompts",
    "engine.device",
    "engine.cpu.parallel",
    "engine.cpu.int8_support",
    "engine.cpu.vector_intrinsics",
    "engine.cpu.int8_kernels",
    "engine.cpu.int8_attention",
    "engine.cpu.int8_model",
    "engine.cuda.selection",
    "engine.build",
    "engine.runner",
    "engine.describe",
    "batching.inference",
    "scorer",
    "adapter_options",
    "langchain",
    "llama_index",
    "telemetry",
    "splitting",
    "remote_wire",
    "remote",
    "server.settings",
    "server.refusal",
    "server.body",
    "server.dialects.dialect",
    "server.dialects.fields",
    "server.dialects.rerank",
    "server.dialects.tei",
    "server.dialects.voyage",
    "server.dialects.nvidia",
    "server.dialects.score",
    "server.dialects.native",
    "server.dialects.table",
    "server.service",
    "server.endpoint",
    "server.openapi",
    "server.probes",
    "server.app",
    "server.run",
    "evaluation.datasets",
    "evaluation.bm25",
    "evaluation.runs",
    "evaluation.measures",
    "evaluation.plots",
    "cli.jobs.requests",
    "cli.jobs.ranking_job",
    "evaluation.reference_scores",
    "cli.stdlib_docs",
    "cli.console",
    "cli.options",
    "cli.summary",
    "cli.rank",
    "cli.evaluate",
    "cli.info",
    "cli.serve",
    "cli.demo",
    "cli.app",
    "cli.__main__",
]
ALLOWED_IN = {
    "torch": {room for room in ROOMS if room.startswith("engine.")},
    "triton": {"engine.cuda.triton_kernels"},
    "langchain_core": {"langchain", "cli.demo"},
    "llama_index": {"llama_index", "cli.demo"},
    "pydantic": {"adapter_options", "langchain", "llama_index"},
    "numba": {"engine.cpu.vector_intrinsics", "engine.cpu.int8_kernels"},
    "llvmlite": {"engine.cpu.vector_intrinsics", "engine.cpu.int8_support"},
    "transformers": {"engine.checkpoint.checkpoint"},
    "huggingface_hub": {"engine.checkpoint.checkpoint"},
    "prometheus_client": {"telemetry"},
    "opentelemetry": {"telemetry"},
    "bm25s": {"evaluation.bm25"},
    "ir_measures": {"evaluation.measures"},
    "matplotlib": {"evaluation.plots"},
    "httpx": {"remote_wire", "remote"},
    "starlette": {"server.app", "server.probes"},
    "uvicorn": {"server.run"},
    "click": {room for room in ROOMS if room.startswith("cli.")},
}


def imported_modules(room: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{room.replace('.', '/')}.py").read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules.add(node.module or "")
    return modules


def test_every_file_is_a_room() -> None:
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_reaches_above_itself(room: str) -> None:
    prefix = "bge_rerank_integrations."
    own = {module.removeprefix(prefix) for module in imported_modules(room) if module.startswith(prefix)}
    assert own <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize("room", ROOMS)
def test_libraries_stay_in_their_rooms(room: str) -> None:
    libraries = {module.partition(".")[0] for module in imported_modules(room)}
    assert all(room in rooms for library, rooms in ALLOWED_IN.items() if library in libraries)


@pytest.mark.parametrize(
    "statement",
    [
        "import bge_rerank_integrations",
        "from bge_rerank_integrations import ScorerConfig, RankedPassage, RerankError",
        "from bge_rerank_integrations import Scorer",
    ],
)
def test_importing_loads_neither_torch_nor_a_framework(statement: str) -> None:
    heavy = ["torch", "transformers", "langchain_core", "llama_index", "pydantic", "httpx", "starlette"]
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("BGEReranker", "langchain_core", "langchain"),
        ("BGERerankPostprocessor", "llama_index.core", "llama-index"),
    ],
)
def test_a_missing_framework_is_named_with_its_command(name: str, library: str, extra: str) -> None:
    # A module that is None in sys.modules is one that cannot be imported; so is pydantic, which only
    # the frameworks bring.
    code = (
        f"import sys; sys.modules[{library!r}] = sys.modules['pydantic'] = None\n"
        f"from bge_rerank_integrations import {name}"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "MissingExtraError" in run.stderr
    assert f'pip install "bge-rerank-integrations[{extra}]"' in run.stderr


def test_all_names_resolve_and_are_all_there_is() -> None:
    for name in bge_rerank_integrations.__all__:
        assert getattr(bge_rerank_integrations, name) is not None
    assert set(bge_rerank_integrations._HOME) == set(bge_rerank_integrations.__all__) - {"__version__"}
    assert dir(bge_rerank_integrations) == sorted(bge_rerank_integrations.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bge_rerank_integrations.nonsense  # noqa: B018
