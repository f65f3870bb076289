"""Handles one HTTP request: API key, body, dialect, ranking, response and log line."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from bge_rerank_integrations.errors import RequestTimeoutError
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.server.body import Receive, parse_object, read_body
from bge_rerank_integrations.server.dialects.dialect import Dialect, Reply, Work
from bge_rerank_integrations.server.dialects.table import choose, error_body
from bge_rerank_integrations.server.refusal import ClientDisconnectedError, Refusal, refusal_of
from bge_rerank_integrations.server.service import Service
from bge_rerank_integrations.server.settings import ServerSettings
from bge_rerank_integrations.telemetry import request_span

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("bge_rerank_integrations.server")

MAX_PAIRS_OF_REQUEST: Final = 20_000
"""Maximum number of documents in a request.

A million short documents fit into a body of a few megabytes. Their response would block the event loop for
seconds and take a gigabyte of memory.
"""
# A request id from a client is used only if it matches this. Other characters could make a log ambiguous.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Time in seconds that a connection with an unread body stays open after the response. Closing it immediately
# would reset it, and the client might lose the response.
_LINGER_S: Final = 1.0


class KeyCheck:
    """Compares the header `Authorization` with the API key, in a time that does not depend on either.

    Args:
        api_key: The key. None accepts every client.
    """

    def __init__(self, api_key: str | None) -> None:
        self._digest = None if api_key is None else _digest(api_key)

    def __call__(self, headers: Mapping[str, str]) -> None:
        """Raise `Refusal` unless the header is `Bearer KEY` or `KEY`."""
        if self._digest is None:
            return
        value = headers.get("authorization", "").strip()
        scheme, _, rest = value.partition(" ")
        key = rest.strip() if scheme.lower() == "bearer" else value
        if not hmac.compare_digest(_digest(key), self._digest):
            raise Refusal(401, "the API key is missing or wrong", "AuthenticationError")


@dataclass
class _Exchange:
    """The state of one request.

    Attributes:
        id: Request id.
        dialect: The dialect of the body. Until the body is read, it is the last dialect of the path.
        is_body_asked: Whether reading the body has begun. A client that sent `Expect: 100-continue` sends
            its body only then.
        is_body_read: Whether the whole body has been read from the connection.
        reply: The content of the response. It is None until the request is ranked.
    """

    id: str
    dialect: Dialect
    is_body_asked: bool = False
    is_body_read: bool = False
    reply: Reply | None = None


class RerankEndpoint:
    """ASGI application of one path.

    Args:
        path: The path, for logs.
        dialects: The dialects of the path.
        service: Ranks the requests.
        settings: The limits.
        check_key: Raises `Refusal` for a client without the API key.
    """

    def __init__(
        self,
        path: str,
        dialects: Sequence[Dialect],
        service: Service,
        settings: ServerSettings,
        check_key: KeyCheck,
    ) -> None:
        self._path = path
        self._dialects = dialects
        self._service = service
        self._settings = settings
        self._check_key = check_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        headers = read_headers(scope)
        exchange = _Exchange(request_id(headers), self._dialects[-1])
        status: int | str
        with request_span(f"POST {self._path}", headers) as set_attribute:
            try:
                status, body, more_headers = await self._answer(exchange, headers, receive)
            except ClientDisconnectedError:
                status = "disconnected"
            else:
                await _respond(
                    receive,
                    send,
                    status,
                    body,
                    {"x-request-id": exchange.id, **more_headers},
                    is_body_read=exchange.is_body_read,
                    is_body_sent=exchange.is_body_asked or "expect" not in headers,
                )
            counts = {} if exchange.reply is None else exchange.reply.counts
            for name, value in counts.items():
                set_attribute(f"bge_rerank.num_{name}", value)
            if isinstance(status, int):
                set_attribute("http.response.status_code", status)
        logger.info(
            "%s %s %s: %s, %s%.1f ms",
            exchange.id,
            self._path,
            exchange.dialect.name,
            status,
            "".join(f"{value} {name}, " for name, value in counts.items()),
            1000 * (time.perf_counter() - started),
        )

    async def _answer(
        self, exchange: _Exchange, headers: Mapping[str, str], receive: Receive
    ) -> tuple[int, Any, dict[str, str]]:
        """Return the status, the JSON body and the headers of the response."""
        try:
            reply = exchange.reply = await self._rank(exchange, headers, receive)
            truncated = reply.counts.get("truncated")
            headers = {} if truncated is None else {"x-truncated-documents": str(truncated)}
            return 200, exchange.dialect.render(reply), headers
        except ClientDisconnectedError:
            raise
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                logger.error("%s %s: %s", exchange.id, self._path, type(error).__name__)
            if refusal.status == 400:
                refusal.status = exchange.dialect.invalid_status
            return refusal.status, error_body(exchange.dialect, refusal), refusal_headers(refusal)

    async def _rank(self, exchange: _Exchange, headers: Mapping[str, str], receive: Receive) -> Reply:
        self._check_key(headers)
        config = self._service.require_scorer().config  # raises before the body is read

        async def receive_body() -> MutableMapping[str, Any]:
            exchange.is_body_asked = True
            message = await receive()
            exchange.is_body_read = not message.get("more_body", False)
            return message

        fields = parse_object(await self._read(headers, receive_body))
        exchange.dialect = choose(self._dialects, fields)
        work = exchange.dialect.parse(fields)
        num_pairs = sum(len(passages) for _, passages in work.requests)
        if num_pairs > MAX_PAIRS_OF_REQUEST:
            message = f"the request has {num_pairs} documents; the server's limit is {MAX_PAIRS_OF_REQUEST}"
            raise Refusal(413, message, "TooManyDocuments")
        rankings = await self._score(work, receive)
        return Reply(
            id=exchange.id,
            created=int(time.time()),
            model=work.model or model_name(self._settings, config.model),
            max_length=config.max_length,
            work=work,
            rankings=rankings,
        )

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        try:
            body = read_body(receive, headers, self._settings.max_body_bytes)
            return await asyncio.wait_for(self._service.receive(body), self._settings.timeout_s)
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            raise Refusal(408, "the request body did not arrive in time", "RequestTimeout") from None

    async def _score(self, work: Work, receive: Receive) -> list[Ranking]:
        """Rank the work. Stop early if the timeout expires or the client disconnects."""
        limits = (self._settings.timeout_s, work.timeout_s)
        timeout_s = min(limit for limit in limits if limit is not None)
        scoring = asyncio.ensure_future(self._service.rank(work))
        disconnect = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({scoring, disconnect}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if scoring.done():
                return scoring.result()
            if disconnect.done():
                raise ClientDisconnectedError
            raise RequestTimeoutError(
                f"the request was not finished within {timeout_s:g} s; sequences that had not started were "
                "dropped"
            )
        finally:
            scoring.cancel()
            disconnect.cancel()
            await asyncio.wait({scoring, disconnect})


def read_headers(scope: Scope) -> dict[str, str]:
    """Return the headers of a request. If a header is repeated, its last value counts."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def request_id(headers: Mapping[str, str]) -> str:
    """Return the request id of the client, or a new id."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def refusal_headers(refusal: Refusal) -> dict[str, str]:
    """Return the headers of the response to a refused request."""
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(refusal.retry_after_s)
    if refusal.type == "ServerDraining":
        headers["connection"] = "close"  # a later request on this connection would be cut off
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def model_name(settings: ServerSettings, model: str) -> str:
    """Return the name of the model in responses. For a folder, it is the last part of the path."""
    return settings.model_name or model.replace("\\", "/").rstrip("/").rpartition("/")[2] or model


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(
    receive: Receive,
    send: Send,
    status: int,
    body: Any,
    headers: Mapping[str, str],
    *,
    is_body_read: bool,
    is_body_sent: bool,
) -> None:
    """Send a JSON response, and close the connection if the body of the request is unread.

    Args:
        receive: The ASGI channel of the request.
        send: The ASGI channel of the response.
        status: HTTP status.
        body: The JSON-serializable body of the response.
        headers: More headers.
        is_body_read: Whether the whole body of the request has been read from the connection.
        is_body_sent: Whether the client sends the body without asking, that is, without the header
            `Expect: 100-continue`.
    """
    lingers = is_body_sent and not is_body_read
    content = json.dumps(body, allow_nan=False).encode()  # ASCII, because a lone surrogate cannot be encoded
    all_headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "cache-control": "no-store",
        **headers,
        **({} if is_body_read else {"connection": "close"}),
    }
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content, "more_body": lingers})
    if lingers:
        await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    """Read and discard the rest of a body, for a limited time."""

    async def discard() -> None:
        more = True
        while more:
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)

    try:
        await asyncio.wait_for(discard(), _LINGER_S)
    except (TimeoutError, asyncio.TimeoutError):
        return


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()
