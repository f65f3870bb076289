"""The body of an HTTP request, as Ray's proxy gives it to a replica."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, Final

from bge_rerank_integrations.server.body import Receive
from bge_rerank_integrations.server.endpoint import Scope
from bge_rerank_integrations.server.refusal import Refusal

# The proxy has usually received the first part before it chooses a replica.
_FIRST_PART_S: Final = 5.0


class RequestBody:
    """The ASGI channel of a request. It refuses the request if another replica has taken parts of its body.

    The proxy gives each part of a body to the replica that asks for it, and keeps no copy. If a replica dies
    after it took a part, and before the proxy knows that the replica accepted the request, the proxy sends
    the request to another replica. That replica would wait for the missing part for ever.

    Args:
        scope: The ASGI scope of the request.
        receive: The channel to the proxy.
        first_part_s: Maximum time in seconds to wait for the first part.

    Raises:
        Refusal: A call finds that a part is missing. The status is 503, so clients try again.
    """

    def __init__(self, scope: Scope, receive: Receive, first_part_s: float = _FIRST_PART_S) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"")
        self._num_missing = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        self._receive = receive
        self._limit_s: float | None = first_part_s
        self._is_complete = False

    async def __call__(self) -> MutableMapping[str, Any]:
        """Return the next message."""
        limit_s, self._limit_s = self._limit_s, None
        try:
            message = await asyncio.wait_for(self._receive(), limit_s)
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            raise self._refusal() from None
        if message["type"] == "http.request" and not self._is_complete:
            self._num_missing -= len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self._is_complete and self._num_missing > 0:
                raise self._refusal()
        return message

    def _refusal(self) -> Refusal:
        message = "the replica that received the request body has died"
        return Refusal(503, message, "ServerUnreachableError", retry_after_s=1)
