"""README.md and docs/: their Python blocks run, their links lead somewhere, and they leave nothing out."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, errors
from bge_rerank_integrations.cli.app import main

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/bge-rerank-integrations/bge-rerank-integrations"
PAGES = sorted(
    str(path.relative_to(ROOT).as_posix()) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
)
# tests/adapters/test_recipes.py runs the code of this page, with stand-ins for servers.
ELSEWHERE = ["docs/recipes.md"]
# Pages with blocks that are compiled and not run, for the reason in the comment above the block.
NOT_RUN = {
    "docs/core.md": 1,
    "docs/index.md": 1,
    "docs/migrating.md": 1,
    "docs/ray.md": 3,
    "docs/server.md": 1,
}

BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A Python block of a page; `output` is what the page says that it prints."""

    code: str
    line: int
    output: str | None
    is_run: bool


def blocks_of(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Block(match["code"], line, match["output"], match["reason"] is None)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_the_code_of_a_page_runs_in_order_and_prints_what_it_says(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks_of(page):
        # Line numbers in a traceback are those of the page.
        compiled = compile("\n" * (block.line - 1) + block.code, page, "exec", dont_inherit=True)
        if not block.is_run:
            continue
        with redirect_stdout(io.StringIO()) as printed:
            exec(compiled, namespace)
        assert printed.getvalue() == (block.output or ""), f"{page}, line {block.line}"


def test_every_python_block_is_found() -> None:
    for page in PAGES:
        assert len(re.findall(r"^\s*(?:```+|~~~+) ?(?:python|py)\b", read(page), re.MULTILINE)) == len(
            list(blocks_of(page))
        ), page


def test_blocks_that_do_not_run_are_counted() -> None:
    skipped = {page: sum(not block.is_run for block in blocks_of(page)) for page in PAGES}
    assert {page: count for page, count in skipped.items() if count} == NOT_RUN
    assert sum(read(page).count("not run:") for page in PAGES) == sum(NOT_RUN.values())


@pytest.mark.parametrize(
    "page",
    [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "training/README.md"],
)
def test_links_lead_to_files(page: str) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        for prefix in (f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/"):
            if target.startswith(prefix):
                assert (ROOT / target.removeprefix(prefix).partition("#")[0]).exists(), target
        if not re.match(r"https?:|#", target):
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target
            assert page != "README.md", f"{target}: the package index shows only absolute links"


def test_anchors_exist() -> None:
    headings = {
        page: {
            re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
        }
        for page in PAGES
    }
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([\w\-]+\.md)#([^)]+)\)", read(page)):
            assert anchor in headings[f"docs/{target}"], f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("adapter", [BGEReranker, BGERerankPostprocessor])
def test_every_option_is_documented(adapter: Any) -> None:
    rows = {
        name
        for line in read("docs/options.md").splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(adapter.model_fields) - {"callback_manager"} <= rows
    assert rows <= set(BGEReranker.model_fields) | set(BGERerankPostprocessor.model_fields)


def test_every_error_is_documented() -> None:
    headings = set(re.findall(r"^### (\w+)$", read("docs/troubleshooting.md"), re.MULTILINE))
    assert headings == set(errors.__all__) - {"missing_extra", "RerankError"}


def test_every_command_is_documented() -> None:
    headings = set(re.findall(r"^## ([a-z\-]+)$", read("docs/cli.md"), re.MULTILINE))
    assert headings == set(main.commands)


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": ([\w\-]+\.md)$", read("mkdocs.yml"), re.MULTILINE)
    assert sorted(f"docs/{name}" for name in named) == [page for page in PAGES if page != "README.md"]


def test_the_script_installs_the_extra() -> None:
    """It names the packages, so that it need not install this one and PyTorch."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later")
    extra = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]["docs"]
    (line,) = [line for line in read("scripts/docs").splitlines() if line.startswith("make_venv ")]
    installed = [Requirement(word) for word in shlex.split(line)[3:]]
    assert [(each.name, each.extras) for each in installed] == [
        (each.name, each.extras) for each in map(Requirement, extra)
    ]
