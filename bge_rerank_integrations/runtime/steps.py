"""Runs calls that are written once as generators of steps, in threads and in asyncio tasks.

A generator yields a step, such as an HTTP request, and gets the outcome of the step. It returns the result of
the call. Only the functions that take a step exist in a sync and an async form. This module itself takes the
step `Sleep`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import NamedTuple, TypeVar

Step = TypeVar("Step")
Outcome = TypeVar("Outcome")
Result = TypeVar("Result")


class Sleep(NamedTuple):
    """A step that waits for some seconds. Its outcome must not be used."""

    seconds: float


def run_steps(steps: Generator[Step | Sleep, Outcome, Result], take: Callable[[Step], Outcome]) -> Result:
    """Take the steps of a call one after the other, and return the result of the call.

    Args:
        steps: The call.
        take: Takes a step other than `Sleep`, and returns its outcome.
    """
    try:
        step = next(steps)
        while True:
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                step = next(steps)
            else:
                step = steps.send(take(step))
    except StopIteration as stop:
        result: Result = stop.value
        return result


async def arun_steps(
    steps: Generator[Step | Sleep, Outcome, Result], take: Callable[[Step], Awaitable[Outcome]]
) -> Result:
    """Do the same as `run_steps` with an async function."""
    try:
        step = next(steps)
        while True:
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                step = next(steps)
            else:
                step = steps.send(await take(step))
    except StopIteration as stop:
        result: Result = stop.value
        return result
