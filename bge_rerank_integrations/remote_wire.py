"""The wire of `RemoteScorer`: which URL, which error, whether to try again, what the answer holds."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from bge_rerank_integrations.errors import (
    AuthenticationError,
    ConfigError,
    DeviceLostError,
    InputError,
    NonFiniteScoreError,
    QueueFullError,
    RemoteError,
    RequestTimeoutError,
    RerankError,
    ServerUnreachableError,
    WorkerDiedError,
    missing_extra,
)

try:
    import httpx
except ImportError as error:
    raise missing_extra("remote", "httpx") from error

from bge_rerank_integrations.ranking import RankedPassage, Ranking

# Last parts of paths that are endpoints, which is not what a base URL ends with.
_ENDPOINTS: Final = frozenset({"rank", "rerank", "ranking", "score", "models"})
_RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})
_FIRST_DELAY_S: Final = 0.25
_MAX_DELAY_S: Final = 8.0
_MAX_MESSAGE_CHARACTERS: Final = 500

# The server's names of errors that mean here what they mean there.
_BY_TYPE: Final[Mapping[str, type[RerankError]]] = {
    kind.__name__: kind
    for kind in (DeviceLostError, NonFiniteScoreError, QueueFullError, RequestTimeoutError, WorkerDiedError)
}
_BY_STATUS: Final[Mapping[int, type[RerankError]]] = {
    400: InputError,
    401: AuthenticationError,
    403: AuthenticationError,
    408: RequestTimeoutError,
    413: InputError,
    422: InputError,
    429: QueueFullError,
    502: ServerUnreachableError,
    503: ServerUnreachableError,
    504: RequestTimeoutError,
}
_PASSAGE_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(RankedPassage))
_COUNTS: Final = frozenset(vars(Ranking()))


class SupportsSecretValue(Protocol):
    """A wrapped secret, such as pydantic's `SecretStr`."""

    def get_secret_value(self) -> str:
        """Return the secret."""


class Answer(NamedTuple):
    """An HTTP response that was read to its end."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class ApiKey:
    """An API key that no representation and no pickle shows."""

    def __init__(self, key: str | SupportsSecretValue | None) -> None:
        value = key if key is None or isinstance(key, str) else key.get_secret_value()
        if value is not None and not (value and all("!" <= character <= "~" for character in value)):
            raise ConfigError("api_key must be printable ASCII without spaces, and not empty")
        self._value = value

    def headers(self) -> dict[str, str]:
        """Return the header that carries the key."""
        return {} if self._value is None else {"authorization": f"Bearer {self._value}"}

    def __repr__(self) -> str:
        return "<no key>" if self._value is None else "<key>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key cannot be pickled")


def check_base_url(base_url: str) -> str:
    """Return a base URL without the slash at its end and without `/v1`."""
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError):
        raise ConfigError("base_url is not a URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url must begin with http:// or https:// and name a host")
    if url.userinfo:
        raise ConfigError("base_url must not hold credentials; give the key as api_key")
    if url.query or url.fragment:
        raise ConfigError("base_url must have no query and no fragment")
    path = url.path.rstrip("/")
    if path.rpartition("/")[2] in _ENDPOINTS:
        raise ConfigError("base_url must be the server's root, not one of its endpoints")
    return str(url.copy_with(path=path.removesuffix("/v1") or "/")).rstrip("/")


def error_of(outcome: Answer | httpx.TransportError | None) -> RerankError:
    """Return the error of this package for a failed attempt."""
    if isinstance(outcome, httpx.TimeoutException):
        return RequestTimeoutError("the server did not answer within the timeout")
    if not isinstance(outcome, Answer):
        return ServerUnreachableError(f"the server cannot be reached ({type(outcome).__name__})")
    told = _told(outcome.content)
    kind = _BY_TYPE.get(str(told.get("type"))) or _BY_STATUS.get(outcome.status, RemoteError)
    message = f"the server answered with status {outcome.status}"
    # Only this package's server is known to leave texts out of its messages.
    if "type" in told and isinstance(told.get("message"), str):
        message = f"{message}: {told['message'][:_MAX_MESSAGE_CHARACTERS]}"
    error = kind(message)
    if isinstance(error, NonFiniteScoreError) and isinstance(told.get("index"), int):
        error.index = told["index"]
    return error


def _told(content: bytes) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def retry_delay(
    outcome: Answer | httpx.TransportError | None, error: RerankError, attempt: int
) -> float | None:
    """Return the seconds to wait before the next attempt; None means that there should be none."""
    own: float = min(_FIRST_DELAY_S * 2.0**attempt, _MAX_DELAY_S) * random.uniform(0.5, 1.0)
    if isinstance(error, RequestTimeoutError) and _was_ours(outcome):
        return None  # the time was over, here or there, and would be again
    if isinstance(outcome, Answer):
        # The server gives every error a type. A proxy that loses its server in the middle of a request, such
        # as that of Ray Serve, answers 500 without one.
        is_lost = outcome.status == 500 and not _was_ours(outcome)
        if outcome.status not in _RETRIED_STATUSES and not is_lost:
            return None
        told = _retry_after(outcome.headers.get("retry-after", ""))
        # The random part keeps clients that were refused together from coming back together.
        return own if told is None else told + own * 0.5
    return own


def _was_ours(outcome: Answer | httpx.TransportError | None) -> bool:
    return not isinstance(outcome, Answer) or "type" in _told(outcome.content)


def _retry_after(value: str) -> float | None:
    """Return the seconds of a `Retry-After` header, which is a number or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def parse_rankings(content: bytes) -> list[Ranking]:
    """Read the server's answer; what a newer server tells beyond what is known here is left out."""
    try:
        return [
            Ranking(
                [
                    RankedPassage(**{name: value for name, value in each.items() if name in _PASSAGE_FIELDS})
                    for each in ranking["passages"]
                ],
                **{name: value for name, value in ranking["counts"].items() if name in _COUNTS},
            )
            for ranking in json.loads(content)["rankings"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise_unusable()


def raise_unusable() -> NoReturn:
    """Raise the error for an answer that is not this package's."""
    raise RemoteError(
        "the server's answer is not a ranking; is base_url that of a `bge-rerank serve`?"
    ) from None
