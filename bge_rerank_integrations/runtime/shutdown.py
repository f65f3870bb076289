"""Stops running forward passes when the interpreter exits.

At exit no caller waits for a score any more, because `threading` has joined every thread that is not a
daemon. A forward pass over a large batch can still take many seconds. If a daemon thread computes while the
interpreter shuts down, the process aborts. Modules that run threads therefore call `begin_exit` in their
`atexit` functions, and models call `raise_if_exiting` before each layer.
"""

from __future__ import annotations

from bge_rerank_integrations.errors import ScorerClosedError

_is_exiting = False


def begin_exit() -> None:
    """Record that the interpreter has begun to exit. It is safe to call this several times."""
    global _is_exiting
    _is_exiting = True


def is_exiting() -> bool:
    """Return whether the interpreter has begun to exit."""
    return _is_exiting


def raise_if_exiting() -> None:
    """Raise `ScorerClosedError` once the interpreter has begun to exit."""
    if _is_exiting:
        raise ScorerClosedError("the interpreter is exiting")
