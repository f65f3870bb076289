"""Calls that are generators of steps sleep as long as a step says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

import pytest

from bge_rerank_integrations.runtime.steps import Sleep, arun_steps, run_steps


def steps() -> Generator[str | Sleep, str, list[str]]:
    first = yield "a"
    yield Sleep(7.5)
    second = yield "b"
    yield Sleep(2.0)
    return [first, second]


def test_a_sync_call_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert run_steps(steps(), str.upper) == ["A", "B"]
    assert slept == [7.5, 2.0]


async def test_an_async_call_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def take(step: str) -> str:
        return step.upper()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert await arun_steps(steps(), take) == ["A", "B"]
    assert slept == [7.5, 2.0]
