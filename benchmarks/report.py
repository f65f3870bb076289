"""Output of every command: hardware and versions, tables, and a last line of JSON."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.common import describe_hardware, version

DISTRIBUTIONS: Final = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "FlagEmbedding",
    "onnxruntime",
    "openvino",
    "nncf",
    "numba",
    "starlette",
    "uvicorn",
    "langchain-classic",
    "langchain-community",
    "llama-index-core",
)


def begin(args: argparse.Namespace, *settings: str) -> dict[str, Any]:
    """Start a report, and print the hardware, versions and settings.

    Args:
        args: The options of the command.
        settings: Names of options to report in addition to the model and the device.
    """
    report: dict[str, Any] = {
        "command": args.command,
        "hardware": describe_hardware(args.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS}},
        "settings": {
            "model": args.model or f"{args.shape}, random weights",
            "device": args.device,
            **{name: getattr(args, name) for name in settings},
        },
    }
    for title in ("hardware", "versions", "settings"):
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in report[title].items()))
    print(flush=True)
    return report


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, width: int = 11
) -> None:
    """Print a table with names in the first column."""
    first = max([len(title), *(len(name) for name, _ in rows)]) + 2
    print(f"{title:{first}}" + "".join(f"{column:>{width}}" for column in columns))
    for name, cells in rows:
        print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    print(flush=True)


def label(result: Mapping[str, Any]) -> str:
    """Return a contender's name for a table."""
    return f"{result['name']}, {result['dtype']}"


def figure(value: float | None, spec: str) -> str:
    """Format a number, or return an empty string for None."""
    return "" if value is None else format(value, spec)


def end(report: dict[str, Any], *, missing: Mapping[str, str], problems: Sequence[str]) -> int:
    """Print missing contenders and problems, then the whole report as JSON. Return the exit status."""
    for key, reason in missing.items():
        print(f"not available: {key}: {reason}")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print(json.dumps({**report, "missing": missing, "problems": problems}))
    return 1 if problems else 0
