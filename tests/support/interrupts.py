"""Does something in the middle of a call, at every line that it executes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class ReachedError(Exception):
    """Ends a call at a chosen line."""


class InterruptError(BaseException):
    """Ends a call as Ctrl-C does."""


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


class Interrupt:
    """Raises an exception in this thread once n calls have begun or ended, counted from `arm`.

    CPython looks for Ctrl-C at these points.

    Attributes:
        is_reached: Whether there were so many calls.
        error: The exception that `call` caught. It is kept, as IPython keeps the last one. Its traceback
            refers to all frames of the call.
    """

    def __init__(self, call_number: int) -> None:
        self.is_reached = False
        self.error: InterruptError | None = None
        self._numbers = iter(range(call_number, -1, -1))

    def arm(self) -> None:
        """Start to count. `call` ends it."""
        sys.setprofile(self._profile)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function, which may call `arm`, and suppress the exception."""
        profiler = sys.getprofile()
        try:
            function()
        except InterruptError as error:
            self.error = error
        finally:
            sys.setprofile(profiler)

    def _profile(self, frame: FrameType, kind: str, _: object) -> None:
        if kind in ("call", "c_return") and next(self._numbers, None) == 0:
            sys.setprofile(None)
            self.is_reached = True
            raise InterruptError


def stop() -> None:
    raise ReachedError
