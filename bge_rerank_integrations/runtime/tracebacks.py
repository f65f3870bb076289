"""Keeps errors from holding on to what the failed code was using."""

from __future__ import annotations

import traceback


def release_frames(error: BaseException) -> None:
    """Drop the local variables that an error's traceback keeps alive. Call it where the error was caught.

    The traceback still says which lines were running. Without this a caller that keeps an error keeps the
    model and the tensors of the failed batch, and an error that is stored in an object that its own frames
    refer to keeps them until the next garbage collection.

    Args:
        error: The error. The entry of the calling frame, which is still running, is removed from its
            traceback. The errors that it was raised from are treated alike.
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
