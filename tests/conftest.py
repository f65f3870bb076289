"""Fixtures of all tests: a small checkpoint with random weights, and the model of transformers for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.plain_model import load_plain_model

# This must be set before a hub library is imported. No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The background jobs of a shell ignore Ctrl-C, and so do their children. Tests send it to both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from bge_rerank_integrations import Scorer
from examples.random_checkpoint import build_random_checkpoint, read_texts

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a two-layer checkpoint of 514 positions."""
    return build_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with heads of 32, the narrowest for products of attention in pairs of bfloat16."""
    return build_random_checkpoint(tmp_path_factory.mktemp("wide-checkpoint"), num_heads=2)


@pytest.fixture(scope="session")
def scorer(checkpoint: Path) -> Iterator[Scorer]:
    """Return a float32 scorer on the CPU."""
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        yield scorer


@pytest.fixture(scope="session")
def plain_model(checkpoint: Path) -> Any:
    """Return the model of transformers for the checkpoint, which tests compare with every fast path."""
    return load_plain_model(checkpoint)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return the passages of the example corpus, English and Chinese."""
    return read_texts()


@pytest.fixture
def assets() -> Path:
    """Return the folder of real data, or skip."""
    if not ASSETS.is_dir():
        pytest.skip(
            "needs the original XLM-RoBERTa tokenizer and public data sets, which are not in the repository"
        )
    return ASSETS
