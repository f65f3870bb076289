"""Runs calls that are written once as generators of steps, in threads and in asyncio tasks.

A generator yields a step, such as an HTTP request, and gets the outcome of the step. It returns the result of
the call. Only the functions that take a step exist in a sync and an async form.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar

Step = TypeVar("Step")
Outcome = TypeVar("Outcome")
Result = TypeVar("Result")


def run_steps(steps: Generator[Step, Outcome, Result], take: Callable[[Step], Outcome]) -> Result:
    """Take the steps of a call one after the other, and return the result of the call.

    Args:
        steps: The call.
        take: Takes a step and returns its outcome.
    """
    try:
        step = next(steps)
        while True:
            step = steps.send(take(step))
    except StopIteration as stop:
        result: Result = stop.value
        return result


async def arun_steps(
    steps: Generator[Step, Outcome, Result], take: Callable[[Step], Awaitable[Outcome]]
) -> Result:
    """Do the same as `run_steps` with an async function."""
    try:
        step = next(steps)
        while True:
            step = steps.send(await take(step))
    except StopIteration as stop:
        result: Result = stop.value
        return result
