"""The model and texts of the stress tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from bge_rerank_integrations import Scorer
from tests.stress.common import Bench


@pytest.fixture
def bench(tmp_path: Path, checkpoint: Path, scorer: Scorer, texts: list[str]) -> Bench:
    """Return the small checkpoint, its scorer, its texts, and an empty folder."""
    return Bench(tmp_path, checkpoint, scorer, texts)
