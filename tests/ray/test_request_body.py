"""The body of a request whose first replica died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `ray`")

from bge_rerank_integrations.ray.request_body import RequestBody
from bge_rerank_integrations.server.refusal import Refusal
from tests.support.queues import PATIENCE_S


def part(body: bytes, more_body: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more_body}


def channel(*messages: dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Return a channel that gives the messages, and then waits for ever."""
    rest = list(messages)

    async def receive() -> dict[str, Any]:
        if not rest:
            await asyncio.sleep(10 * PATIENCE_S)
        return rest.pop(0)

    return receive


def scope(content_length: bytes | None) -> dict[str, Any]:
    headers = [] if content_length is None else [(b"content-length", content_length)]
    return {"type": "http", "headers": headers}


async def read(body: RequestBody) -> bytes:
    received = b""
    more = True
    while more:
        message = await body()
        received += message["body"]
        more = message["more_body"]
    return received


async def check_refused(body: RequestBody) -> None:
    with pytest.raises(Refusal, match="has died") as caught:
        await asyncio.wait_for(read(body), PATIENCE_S)
    assert (caught.value.status, caught.value.type) == (503, "ServerUnreachableError")
    assert caught.value.retry_after_s == 1


async def test_a_body_that_never_comes_is_not_waited_for() -> None:
    await check_refused(RequestBody(scope(b"4"), channel(), 0.01))


@pytest.mark.parametrize("messages", [[part(b"")], [part(b"cd")], [part(b"b", True), part(b"cd")]])
async def test_a_body_without_its_first_part_is_refused(messages: list[dict[str, Any]]) -> None:
    await check_refused(RequestBody(scope(b"4"), channel(*messages)))


@pytest.mark.parametrize("length", [b"4", b"3", None, b"", b"four", b"9" * 5000])
async def test_a_whole_body_passes(length: bytes | None) -> None:
    body = RequestBody(scope(length), channel(part(b"ab", True), part(b"", True), part(b"cd")))
    assert await read(body) == b"abcd"


async def test_later_messages_are_waited_for_without_a_limit() -> None:
    body = RequestBody(scope(b"2"), channel(part(b"ab"), {"type": "http.disconnect"}), PATIENCE_S)
    assert await read(body) == b"ab"
    assert (await body())["type"] == "http.disconnect"

    body = RequestBody(scope(b"2"), channel(part(b"ab")), 0.01)
    assert await read(body) == b"ab"
    waiting = asyncio.ensure_future(body())
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    assert not done
    waiting.cancel()


async def test_a_client_that_left_is_not_an_error_of_the_body() -> None:
    body = RequestBody(scope(b"4"), channel({"type": "http.disconnect"}))
    assert (await body())["type"] == "http.disconnect"
