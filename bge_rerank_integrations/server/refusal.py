"""Converts errors to HTTP statuses and messages. No message contains a text of the user."""

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
class Refusal(Exception):  # noqa: N818  # a refusal, such as that of a full queue, is not always an error
    """The response to a request that gets no result.

    Attributes:
        status: HTTP status.
        message: The reason. It never contains a text of the user.
        type: Name of the class of the error, or of the condition.
        index: Position of the invalid passage or request. None if there is no such position.
        retry_after_s: Time in seconds after which the client may try again. None if trying again does not
            help.
    """

    status: int
    message: str
    type: str
    index: int | None = None
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)


class ClientDisconnectedError(Exception):
    """The client closed the connection and does not wait for a response."""


# (class, status, `retry_after_s`). A subclass must come before its base class.
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
    """Return the response to a request that failed with an error.

    The message of an unexpected error may contain a text of the user. For such an error, the response
    contains only the name of its class.
    """
    if isinstance(error, Refusal):
        return error
    for kind, status, retry_after_s in _STATUSES:
        if isinstance(error, kind):
            index = getattr(error, "index", None)
            return Refusal(status, str(error), type(error).__name__, index, retry_after_s)
    return Refusal(500, f"the server failed ({type(error).__name__})", "InternalError")
