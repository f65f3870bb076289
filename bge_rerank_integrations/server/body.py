"""Reads and parses the body of a request, up to a maximum size."""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from bge_rerank_integrations.server.refusal import ClientDisconnectedError, Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# The format, zlib or gzip, is detected from the header.
_ZLIB_OR_GZIP: Final = 32 + zlib.MAX_WBITS
# Maximum number of members in a concatenated gzip file. Each new member copies the rest of its chunk.
_MAX_MEMBERS: Final = 10_000


class _Plain:
    """Returns bytes unchanged."""

    is_complete = True

    def unpack(self, chunk: bytes, _: int) -> bytes:
        return chunk


class _Compressed:
    """Decompresses gzip or zlib, up to a maximum number of bytes."""

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(_ZLIB_OR_GZIP)
        self._num_members = 1

    @property
    def is_complete(self) -> bool:
        return self._decompressor.eof

    def unpack(self, chunk: bytes, max_bytes: int) -> bytes:
        unpacked = bytearray()
        while chunk and len(unpacked) < max_bytes:
            if self._decompressor.eof:  # gzip files may be concatenated
                self._num_members += 1
                if self._num_members > _MAX_MEMBERS:
                    raise zlib.error
                self._decompressor = zlib.decompressobj(_ZLIB_OR_GZIP)
            unpacked += self._decompressor.decompress(chunk, max_bytes - len(unpacked))
            chunk = self._decompressor.unconsumed_tail or self._decompressor.unused_data
        return bytes(unpacked)


_UNPACKERS: Final[Mapping[str, Callable[[], _Plain | _Compressed]]] = {
    "": _Plain,
    "identity": _Plain,
    "gzip": _Compressed,
    "x-gzip": _Compressed,
    "deflate": _Compressed,
}


async def read_body(receive: Receive, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """Read a whole body and decompress it.

    Args:
        receive: The ASGI channel.
        headers: The headers, with lower-case names.
        max_bytes: Maximum number of bytes after decompression. Bytes beyond it are not kept.

    Raises:
        Refusal: The body is too large (413), has an unknown compression (415), or is damaged (400).
        ClientDisconnectedError: The client closed the connection.
    """
    too_large = Refusal(
        413, f"the request body is larger than {max_bytes} bytes, the server's limit", "BodyTooLarge"
    )
    make_unpacker = _UNPACKERS.get(headers.get("content-encoding", "").strip().lower())
    if make_unpacker is None:
        raise Refusal(415, "the content encoding must be gzip, deflate or none", "UnsupportedEncoding")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and float(declared) > max_bytes:  # `int` refuses thousands of digits
        raise too_large
    unpacker = make_unpacker()
    body = bytearray()
    num_received = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        num_received += len(chunk)
        try:
            body += unpacker.unpack(chunk, max_bytes - len(body) + 1)
        except zlib.error:
            raise Refusal(400, "the compressed request body is damaged", "DamagedBody") from None
        if max(len(body), num_received) > max_bytes:
            raise too_large
    if not unpacker.is_complete:
        raise Refusal(400, "the compressed request body is incomplete", "DamagedBody")
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Refusal: The bytes are not a JSON object (400).
    """
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # the message of a ValueError may quote the body
        raise Refusal(400, "the request body is not valid JSON in UTF-8", "MalformedJson") from None
    if not isinstance(data, dict):
        raise Refusal(
            400, f"the request body must be a JSON object, not {type(data).__name__}", "MalformedJson"
        )
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
