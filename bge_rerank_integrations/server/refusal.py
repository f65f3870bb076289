"""From an error to an HTTP status and a typed message without any text of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bge_rerank_integrations.errors import (
    DeviceLostError,
    ForkedProcessError,
    InputError,
    NonFiniteScoreError,
    QueueFullError,
    RequestTimeoutError,
    ScorerClosedError,
    WorkerDiedError,
)


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818  # a full queue is no error of anybody's
    """A request that gets no result.

    Attributes:
        status: HTTP status.
        message: What is wrong; it never holds a text of the user's.
        type: Name of the error's class, or of the condition.
        index: Position of the offending passage or request; None where there is none.
        retry_after_s: When to try again; None where trying again does not help.
    """

    status: int
    message: str
    type: str
    index: int | None = None
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)


class ClientDisconnectedError(Exception):
    """The client closed the connection, so there is nobody to answer."""


# (error, status, seconds after which to try again); a subclass stands before its base.
_STATUSES: Final[tuple[tuple[type[Exception], int, int | None], ...]] = (
    (InputError, 400, None),
    (QueueFullError, 429, 1),
    (RequestTimeoutError, 504, None),
    (ScorerClosedError, 503, 5),
    (WorkerDiedError, 503, 1),
    (DeviceLostError, 503, None),
    (ForkedProcessError, 503, None),
    (NonFiniteScoreError, 500, None),
)


def refusal_of(error: Exception) -> Refusal:
    """Return what to tell a client about an error.

    An error that this package does not raise on purpose may hold anything in its message, so only the name
    of its class is told.
    """
    if isinstance(error, Refusal):
        return error
    for kind, status, retry_after_s in _STATUSES:
        if isinstance(error, kind):
            index = getattr(error, "index", None)
            return Refusal(status, str(error), type(error).__name__, index, retry_after_s)
    return Refusal(500, f"the server failed ({type(error).__name__})", "InternalError")
