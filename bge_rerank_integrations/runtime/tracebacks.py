"""What a caught exception says, and the objects that its traceback keeps alive."""

from __future__ import annotations

import signal
import traceback
from functools import partial


def release_frames(error: BaseException) -> None:
    """Clear the local variables of the frames in an exception's traceback. Call this where it was caught.

    The traceback still shows which lines were running. Without this call, a caller that keeps the exception
    also keeps the model and the tensors of the failed batch in memory. If one of the frames refers to an
    object that stores the exception, only the garbage collector would free them.

    Args:
        error: The exception. Its causes and contexts are cleared too. The entry of the calling frame is
            removed from its traceback, because that frame is still running.
    """
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            pending += [current.__cause__, current.__context__]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for a log. The message may be empty."""
    return next(iter(str(error).splitlines()), "")


def raise_if_of_signal_handler(error: BaseException) -> None:
    """Raise an error again if a signal handler raised it, such as the time limit of a job runner.

    Call this where an error of a library means a damaged file or a missing kernel.
    """
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    if any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error


def _code_of(handler: object) -> object:
    """Return the code of a function, a method, a partial function or an object that can be called."""
    while isinstance(handler, partial):
        handler = handler.func
    if not callable(handler):  # such as `SIG_DFL`
        return None
    call = handler if hasattr(handler, "__code__") else getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(call, "__code__", None)
