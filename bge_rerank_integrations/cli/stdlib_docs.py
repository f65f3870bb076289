"""A corpus that every machine has: the documentation of the installed Python's standard library."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

QUESTIONS: Final = (
    "run a function later in another thread",
    "compare two files line by line and show what changed",
    "find all files whose names match a pattern",
    "get random bytes for a secret key",
    "find where a module's source file is",
    "ask the user for a password without showing it",
    "split a string by a regular expression",
    "print an error with its traceback",
    "copy a whole directory tree",
    "how do I know whether a year is a leap year?",
)
"""Questions for which BM25's first passage shares words with the question but does not answer it."""

_MIN_WORDS: Final = 5
_MAX_WORDS: Final = 150
# These modules are written in C, so there is no Python source to parse. Importing them has no side effects.
_COMPILED: Final = ("builtins", "itertools", "math", "time", "sys", "zlib", "gc", "array", "cmath", "_thread")
_NOT_DOCUMENTATION: Final = (
    "test",
    "tkinter",
    "distutils",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
)


def read_stdlib_docs() -> dict[str, str]:
    """Return the documented functions and classes of the standard library.

    Returns:
        Maps a dotted name to a passage that begins with the name, such as "threading.Timer: Call a function
        after ...".
    """
    folder = Path(sysconfig.get_path("stdlib"))
    docs: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] in _NOT_DOCUMENTATION or any(part.startswith("_") for part in parts[:-1]):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(part.startswith("_") for part in module.split(".")):
            docs.update(_docs_of_source(module, path))
    for module in _COMPILED:
        docs.update(_docs_of_compiled(module))
    return docs


def _docs_of_source(module: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some files are invalid on purpose, to test parsers
        return
    pending: list[tuple[str, ast.AST]] = [(module, node) for node in tree.body]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if text := _passage(name, ast.get_docstring(node)):
            yield name, text
        if isinstance(node, ast.ClassDef):
            pending.extend((name, child) for child in node.body)


def _docs_of_compiled(module: str) -> Iterator[tuple[str, str]]:
    if module not in sys.builtin_module_names and module not in sys.stdlib_module_names:
        return
    for name, value in vars(importlib.import_module(module)).items():
        if not name.startswith("_") and callable(value):
            full_name = f"{module}.{name}"
            if text := _passage(full_name, inspect.getdoc(value)):
                yield full_name, text


def _passage(name: str, docstring: str | None) -> str | None:
    words = (docstring or "").split()
    if len(words) < _MIN_WORDS:
        return None
    return f"{name}: {' '.join(words[:_MAX_WORDS])}"
