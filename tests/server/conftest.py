"""Servers of the small checkpoint, and one with a scorer that the test holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.server import ServerSettings, create_app
from tests.support.servers import HeldScorer, running

KEY = "KEY-CANARY-1234"


@pytest.fixture(scope="package")
def local(checkpoint: Path) -> Iterator[Scorer]:
    """Return the scorer that both servers use."""
    with Scorer(checkpoint, device="cpu", dtype="float32", max_queued_tokens=200_000) as scorer:
        yield scorer


@pytest.fixture(scope="package")
def open_url(local: Scorer) -> Iterator[str]:
    """Return the URL of a server with the small checkpoint that asks for no key."""
    with running(create_app(local)) as url:
        yield url


@pytest.fixture(scope="package")
def keyed_url(local: Scorer) -> Iterator[str]:
    """Return the URL of a server with the small checkpoint that asks for `KEY`."""
    with running(create_app(local, ServerSettings(api_key=KEY))) as url:
        yield url


@pytest.fixture
def client(open_url: str) -> Iterator[httpx.Client]:
    """Return a client of the server that asks for no key."""
    with httpx.Client(base_url=open_url, timeout=30) as client:
        yield client


@pytest.fixture
def held() -> HeldScorer:
    """Return a scorer that is released by `is_held = False`."""
    return HeldScorer(max_queued_tokens=1000)


@pytest.fixture
def held_client(held: HeldScorer) -> Iterator[httpx.Client]:
    """Return a client of a server with the held scorer, small limits and no key."""
    app: Any = create_app(held, ServerSettings(max_body_mib=0.01, timeout_s=5))  # type: ignore[arg-type]
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client
        held.is_held = False
