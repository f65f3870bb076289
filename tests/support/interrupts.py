"""Does something in the middle of a call, at every line that it executes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class ReachedError(Exception):
    """Ends a call at a chosen line."""


def call_at(line: int, functions: set[Any], action: Callable[[], object], call: Callable[[], object]) -> bool:
    """Call a function, and an action before the n-th line that it executes in some functions.

    Returns:
        Whether the function executed so many lines.
    """
    lines = iter(range(line, -1, -1))
    is_reached = False

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        nonlocal is_reached
        if frame.f_code not in {function.__code__ for function in functions}:
            return None
        if kind == "line" and next(lines, None) == 0:
            sys.settrace(None)
            is_reached = True
            action()
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except ReachedError:
        pass
    finally:
        sys.settrace(tracer)
    return is_reached


def call_until(call_number: int, call: Callable[[], object]) -> bool:
    """Call a function, and raise an exception once n calls inside it have begun or ended.

    CPython looks for Ctrl-C at these points.

    Returns:
        Whether there were so many.
    """
    numbers = iter(range(call_number, -1, -1))
    is_reached = False

    def profile(_: FrameType, kind: str, __: object) -> None:
        nonlocal is_reached
        if kind in ("call", "c_return") and next(numbers, None) == 0:
            sys.setprofile(None)
            is_reached = True
            raise ReachedError

    profiler = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except ReachedError:
        pass
    finally:
        sys.setprofile(profiler)
    return is_reached


def stop() -> None:
    raise ReachedError
