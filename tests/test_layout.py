"""Rules for imports: which module may import which, and which libraries are imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bge_rerank_integrations

PACKAGE = Path(bge_rerank_integrations.__file__).parent

# The layers of the package, lowest first. A module may only import from its own row and from earlier rows of
# this list. A row is a module, or a folder, which ends with a dot. A module belongs to the longest row that
# matches it.
ROWS = [
    "errors",
    "runtime.",
    "config",
    "validation",
    "ranking",
    "protocols",
    "text.",
    # The modules that the folders of the engine use.
    "engine.cpu.onednn_limit",
    "engine.cpu.amx",
    "engine.cpu.llvm_features",
    "engine.cpu.vector_support",
    "engine.cpu.cores",
    "engine.packing",
    "engine.padded_rows",
    "engine.current_device",
    "engine.attention_trial",
    "engine.attention_by_length",
    "engine.cuda.triton_attention",
    "engine.cpu.compiler",
    "engine.cpu.int8_support",
    "engine.cpu.vector_intrinsics",
    "engine.cpu.bfloat16_pairs",
    "engine.cpu.amx_products",
    "engine.cpu.attention_tiles",
    "engine.cpu.head_rows",
    "engine.cpu.float32_attention",
    "engine.cpu.bfloat16_attention",
    "engine.attention",
    "engine.cpu.shared_work",
    "engine.cpu.float32_products",
    "engine.linear",
    "engine.cuda.support",
    "engine.device",
    "engine.shape",
    "engine.checkpoint.",
    "engine.blocks",
    "engine.model",
    "engine.cuda.",
    "engine.cpu.",
    "engine.",
    "batching.",
    "scorer",
    "adapters.",
    "langchain",
    "llama_index",
    "telemetry",
    "api_key",
    "splitting",
    "divided_calls",
    "remote_wire",
    "remote_transport",
    "remote",
    "server.",
    "ray.",
    "evaluation.",
    "cli.",
]
# Libraries, and the modules or folders that may import them.
ALLOWED_IN = {
    "torch": ["engine."],
    "triton": ["engine.cuda.triton_attention", "engine.cuda.triton_kernels"],
    "langchain_core": ["adapters.cross_encoder", "adapters.document_texts", "langchain", "cli.demo"],
    "flash_attn_interface": ["engine.attention"],
    "llama_index": ["llama_index", "cli.demo"],
    "pydantic": ["adapters.options", "adapters.copies", "langchain", "llama_index", "ray.serve"],
    "numba": [
        "engine.cpu.vector_intrinsics",
        "engine.cpu.bfloat16_pairs",
        "engine.cpu.amx_products",
        "engine.cpu.int16_products",
        "engine.cpu.compiler",
    ],
    "llvmlite": [
        "engine.cpu.vector_intrinsics",
        "engine.cpu.amx_products",
        "engine.cpu.int16_products",
        "engine.cpu.bfloat16_pairs",
        "engine.cpu.vector_support",
        "engine.cpu.llvm_features",
    ],
    "transformers": ["engine.checkpoint.model_config"],
    "huggingface_hub": ["engine.checkpoint.download"],
    "prometheus_client": ["telemetry"],
    "opentelemetry": ["telemetry"],
    "bm25s": ["evaluation.bm25"],
    "ir_measures": ["evaluation.measures"],
    "matplotlib": ["evaluation.plots"],
    "click": ["cli."],
    "httpx": ["remote_wire", "remote_transport", "remote"],
    "starlette": ["server.app", "server.pages", "server.probes", "ray.replica"],
    "uvicorn": ["server.run"],
    "ray": ["ray.", "cli.rank_on_ray"],
    "pyarrow": ["ray."],
}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def lies_in(module: str, place: str) -> bool:
    return module.startswith(place) if place.endswith(".") else module == place


def row_of(module: str) -> int:
    rows = [row for row in ROWS if lies_in(module, row)]
    assert rows, f"{module} lies in no row; put it into a folder, or give it a row"
    return ROWS.index(max(rows, key=len))


def imported_modules(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules.add(node.module or "")
    return modules


def own_imports(module: str) -> set[str]:
    prefix = "bge_rerank_integrations."
    return {name.removeprefix(prefix) for name in imported_modules(module) if name.startswith(prefix)}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_reaches_above_itself(module: str) -> None:
    above = {name for name in own_imports(module) if row_of(name) > row_of(module)}
    assert not above


def test_every_row_has_a_module() -> None:
    assert {row_of(module) for module in MODULES} == set(range(len(ROWS)))


def test_imports_have_no_circle() -> None:
    TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_in_their_places(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imported_modules(module)}
    for library, places in ALLOWED_IN.items():
        assert library not in libraries or any(lies_in(module, place) for place in places), library


@pytest.mark.parametrize(
    "statement",
    [
        "import bge_rerank_integrations",
        "from bge_rerank_integrations import ScorerConfig, RankedPassage, RerankError",
        "from bge_rerank_integrations import Scorer",
        "from bge_rerank_integrations.server import ServerSettings",
        "from bge_rerank_integrations.cli.app import main",
    ],
)
def test_importing_loads_neither_torch_nor_a_framework(statement: str) -> None:
    heavy = [
        *("torch", "transformers", "langchain_core", "llama_index", "pydantic", "httpx", "starlette"),
        *("ray", "pyarrow"),
    ]
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("BGEReranker", "langchain_core", "langchain"),
        ("BGERerankPostprocessor", "llama_index.core", "llama-index"),
        ("ray.rerank_dataset", "ray", "ray"),
        ("ray.score_dataset", "ray.data", "ray"),
        ("ray.app", "ray", "ray"),
        ("ray.ServeScorer", "ray", "ray"),
        ("server.create_app", "starlette", "server"),
    ],
)
def test_a_missing_framework_is_named_with_its_command(name: str, library: str, extra: str) -> None:
    # A module that is None in sys.modules cannot be imported. Only the frameworks install pydantic, so it is
    # missing too.
    module, _, attribute = f"bge_rerank_integrations.{name}".rpartition(".")
    code = (
        f"import sys; sys.modules[{library!r}] = sys.modules['pydantic'] = None\n"
        f"from {module} import {attribute}"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "MissingExtraError" in run.stderr
    assert f'pip install "bge-rerank-integrations[{extra}]"' in run.stderr


def test_help_works_without_the_frameworks() -> None:
    code = (
        "import sys, pydoc\n"
        "for name in ('langchain_core', 'llama_index.core', 'httpx'):\n"
        "    sys.modules[name] = None\n"
        "import bge_rerank_integrations\n"
        "print(pydoc.render_doc(bge_rerank_integrations, renderer=pydoc.plaintext))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "class Scorer(" in run.stdout
    for name in ("BGEReranker", "BGERerankPostprocessor", "RemoteScorer"):
        assert f"class {name}(" not in run.stdout


def test_all_names_resolve_and_are_all_there_is() -> None:
    for name in bge_rerank_integrations.__all__:
        assert getattr(bge_rerank_integrations, name) is not None
    assert set(bge_rerank_integrations._HOME) == set(bge_rerank_integrations.__all__) - {"__version__"}
    assert dir(bge_rerank_integrations) == sorted(bge_rerank_integrations.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bge_rerank_integrations.nonsense  # noqa: B018
