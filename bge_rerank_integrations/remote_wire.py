"""The HTTP format of `RemoteScorer`: its URL, errors, retries and the content of responses."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from bge_rerank_integrations.api_key import is_api_key
from bge_rerank_integrations.divided_calls import Part, random_delay_s
from bge_rerank_integrations.errors import (
    AuthenticationError,
    ConfigError,
    DeviceLostError,
    InputError,
    InputTypeError,
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
from bge_rerank_integrations.validation import MAX_TIMEOUT_S

# A URL that ends with one of these names is an endpoint and not a base URL.
_ENDPOINTS: Final = frozenset({"rank", "rerank", "ranking", "score", "models"})
_RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})
_MAX_MESSAGE_CHARACTERS: Final = 500

# The errors of the server that are raised here as errors of the same class.
_BY_TYPE: Final[Mapping[str, type[RerankError]]] = {
    kind.__name__: kind
    for kind in (
        DeviceLostError,
        InputError,
        InputTypeError,
        NonFiniteScoreError,
        QueueFullError,
        RequestTimeoutError,
        WorkerDiedError,
    )
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
    """A complete HTTP response."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class ApiKey:
    """An API key that neither `repr` nor a pickle contains."""

    def __init__(self, key: str | SupportsSecretValue | None) -> None:
        read = getattr(key, "get_secret_value", None)
        value = key if read is None else read()
        if value is not None and not isinstance(value, str):
            raise ConfigError("api_key must be a string, a secret such as pydantic's SecretStr, or None")
        if value is not None and not is_api_key(value):
            raise ConfigError("api_key must be printable ASCII without spaces, and not empty")
        self._value = value

    def headers(self) -> dict[str, str]:
        """Return the header that contains the key."""
        return {} if self._value is None else {"authorization": f"Bearer {self._value}"}

    def __repr__(self) -> str:
        return "<no key>" if self._value is None else "<key>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key cannot be pickled")


def check_base_url(base_url: str) -> str:
    """Return a base URL without `/v1` and without a final slash. Raise `ConfigError` if it is invalid."""
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError):
        raise ConfigError("base_url is not a URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url must begin with http:// or https:// and contain a host")
    try:
        url.host.encode("idna")  # the connection does this too
    except UnicodeError:
        raise ConfigError("the host of base_url is not a valid name") from None
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise ConfigError("the port of base_url must be from 1 to 65535")
    if url.userinfo:
        raise ConfigError("base_url must not contain credentials; pass the key as api_key")
    if "?" in str(base_url) or "#" in str(base_url):
        raise ConfigError("base_url must not contain a query or a fragment")
    path = url.path.rstrip("/")
    parent, _, last = path.rpartition("/")
    # With a final slash, such a name is a path prefix of a proxy, except after `/v1` or `/v2`.
    is_prefix = url.path.endswith("/") and not parent.endswith(("/v1", "/v2"))
    if last in _ENDPOINTS and not is_prefix:
        raise ConfigError("base_url must be the root of the server, not one of its endpoints")
    try:
        return str(url.copy_with(path=path.removesuffix("/v1") or "/")).rstrip("/")
    except httpx.InvalidURL:  # an encoded `?` or `#`, which httpx decodes
        raise ConfigError("the path of base_url must not contain an encoded ? or #") from None


def error_of(outcome: Answer | httpx.RequestError) -> RerankError:
    """Return the error of this package for a failed attempt."""
    if isinstance(outcome, httpx.TimeoutException):
        return RequestTimeoutError("the server did not answer within the timeout")
    if not isinstance(outcome, Answer):
        return ServerUnreachableError(f"the server cannot be reached ({_reason(outcome)})")
    fields = _error_fields(outcome.content)
    kind = _BY_TYPE.get(str(fields.get("type"))) or _BY_STATUS.get(outcome.status, RemoteError)
    if outcome.status == 400 and not isinstance(fields.get("type"), str):
        kind = RemoteError  # of a proxy, or of a server that expects HTTPS
    message = f"the server answered with status {outcome.status}"
    # Messages of other servers may contain texts of the user.
    if "type" in fields and isinstance(fields.get("message"), str):
        message = f"{message}: {fields['message'][:_MAX_MESSAGE_CHARACTERS]}"
    error = kind(message)
    index = fields.get("index")
    if isinstance(error, InputError | NonFiniteScoreError) and type(index) is int and index >= 0:
        error.index = index
    return error


def _reason(error: httpx.RequestError) -> str:
    """Return why a request failed. Only messages of failed connections surely contain no secret."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, httpx.ConnectError) and str(error) else name


def _is_untrusted(error: httpx.RequestError) -> bool:
    return isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error)


def _error_fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def retry_delay(outcome: Answer | httpx.RequestError, error: RerankError, attempt: int) -> float | None:
    """Return the delay in seconds before the next attempt, or None if the error is final."""
    own = random_delay_s(attempt)
    is_timeout = isinstance(error, RequestTimeoutError)  # then another attempt would take as long
    if not isinstance(outcome, Answer):
        return None if is_timeout or _is_untrusted(outcome) else own
    # The server gives every error a type. A proxy that loses its server in the middle of a request, such as
    # that of Ray Serve, answers 500 without one.
    has_type = "type" in _error_fields(outcome.content)
    is_lost = outcome.status == 500 and not has_type
    if (is_timeout and has_type) or (outcome.status not in _RETRIED_STATUSES and not is_lost):
        return None
    asked = _retry_after(outcome.headers.get("retry-after", ""))
    # The random part spreads the attempts of clients that were refused at the same time.
    return own if asked is None else asked + own * 0.5


def _retry_after(value: str) -> float | None:
    """Return the delay in seconds of a `Retry-After` header, which contains a number or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            # HTTP dates are in UTC. The oldest of their formats does not say so.
            seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_TIMEOUT_S) if math.isfinite(seconds) else None


def parse_rankings(content: bytes, part: Part) -> list[Ranking]:
    """Read the rankings of a part. Unknown fields, which a newer server may send, are ignored.

    Raises:
        RemoteError: The content is not one complete ranking of raw logits for each request of the part.
    """
    try:
        rankings = [_read_ranking(each) for each in json.loads(content)["rankings"]]
        for (_, passages), ranking in zip(part.requests, rankings, strict=True):
            _check_ranking(ranking, len(passages), part.top_n)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise_unusable()
    return rankings


def _read_ranking(fields: Mapping[str, Any]) -> Ranking:
    counts = {name: value for name, value in fields["counts"].items() if name in _COUNTS}
    if any(type(count) is not int or count < 0 for count in counts.values()):
        raise ValueError
    return Ranking(map(_read_passage, fields["passages"]), **counts)


def _read_passage(fields: Mapping[str, Any]) -> RankedPassage:
    passage = RankedPassage(**{name: value for name, value in fields.items() if name in _PASSAGE_FIELDS})
    flags, numbers = (passage.truncated, passage.blank), (passage.index, passage.windows)
    if any(type(flag) is not bool for flag in flags) or any(type(number) is not int for number in numbers):
        raise TypeError
    if type(passage.score) not in (int, float) or not math.isfinite(passage.score):
        raise ValueError
    return dataclasses.replace(passage, score=float(passage.score))


def _check_ranking(ranking: Ranking, num_passages: int, top_n: int | None) -> None:
    expected = num_passages if top_n is None else min(top_n, num_passages)
    indices = {passage.index for passage in ranking}
    if not len(ranking) == len(indices) == expected or not indices <= set(range(num_passages)):
        raise ValueError


def raise_unusable() -> NoReturn:
    """Raise the exception for a response that is not from a server of this package."""
    raise RemoteError(
        "the response is not a ranking; check that base_url is the address of a `bge-rerank serve` process"
    ) from None
