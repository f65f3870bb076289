"""Runs the examples in the docstrings of the public modules with the embedded model."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from opentelemetry import metrics
from prometheus_client import CollectorRegistry

import bge_rerank_integrations
from bge_rerank_integrations import BGEReranker, Scorer, ScorerConfig

MODULES = [
    "adapters.options",
    "batching.batcher",
    "batching.stats",
    "cli.options",
    "config",
    "errors",
    "langchain",
    "llama_index",
    "protocols",
    "ranking",
    "runtime.shared_objects",
    "scorer",
    "server.app",
    "server.settings",
    "splitting",
    "telemetry",
]


def find_examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = import_module(f"bge_rerank_integrations.{name}")
        yield from (example for example in finder.find(module) if example.examples)


EXAMPLES = sorted(find_examples(), key=lambda example: example.name)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """Return the names that the examples use without defining them."""
    with Scorer("embedded", device="cpu", dtype="float32") as scorer:
        yield {
            **{name: getattr(bge_rerank_integrations, name) for name in bge_rerank_integrations.__all__},
            "Document": Document,
            "np": np,
            "runner": scorer._require_pipeline().runners[0],
            "opentelemetry": SimpleNamespace(metrics=metrics),
            "prometheus_client": SimpleNamespace(REGISTRY=CollectorRegistry()),
            "reranker": BGEReranker(scorer=scorer),
            "scorer": scorer,
        }
    Scorer.shared(ScorerConfig(model="embedded")).close()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_examples_in_docstrings_run(example: doctest.DocTest, names: dict[str, Any]) -> None:
    example.globs = {**example.globs, **names}
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


@pytest.mark.parametrize("name", ["BGERerankPostprocessor", "BGEReranker", "Scorer", "ScorerConfig"])
def test_the_main_classes_have_examples(name: str) -> None:
    value = getattr(bge_rerank_integrations, name)
    assert f"{value.__module__}.{value.__qualname__}" in [example.name for example in EXAMPLES]
