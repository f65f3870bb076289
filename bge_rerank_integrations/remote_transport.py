"""Sends the HTTP requests of `RemoteScorer`, in threads and in asyncio tasks."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final, NamedTuple, TypeVar

from bge_rerank_integrations.errors import ConfigError, ScorerClosedError, missing_extra

try:
    import httpx
except ImportError as error:
    raise missing_extra("remote", "httpx") from error

from bge_rerank_integrations.remote_wire import Answer, ApiKey, raise_unusable
from bge_rerank_integrations.runtime.locks import SafeLock
from bge_rerank_integrations.runtime.steps import Sleep, arun_steps, run_steps

T = TypeVar("T")
Client = TypeVar("Client", httpx.Client, httpx.AsyncClient)

_CLOSED_DURING_CALL: Final = "this scorer was closed during the call"


class Send(NamedTuple):
    """A step of a call: post a body, within `timeout_s` seconds if that is not None."""

    content: bytes
    timeout_s: float | None


Outcome = Answer | httpx.RequestError
"""The result of a step: a response, or the error of the request."""

Steps = Generator[Send | Sleep, Outcome, T]
"""A call as a generator of steps; see `runtime.steps`."""


class Transport:
    """Posts to one URL. Any number of threads and tasks can use it.

    Args:
        url: The URL.
        key: The API key that every request contains.
        client: The client for sync calls, which stays open. None creates one at first use.
        async_client: The same for async calls. None creates one for each event loop.
    """

    def __init__(
        self, url: str, key: ApiKey, client: httpx.Client | None, async_client: httpx.AsyncClient | None
    ) -> None:
        self._url = url
        self._key = key
        self._given_client = client
        self._given_async_client = async_client
        self._lock = SafeLock()
        self._is_closed = False
        self._client: _SharedClient | None = None
        # A client refers to its event loop. The clients of closed loops are removed when another is created.
        self._async_clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    @property
    def has_given_client(self) -> bool:
        """Whether a client was given. Such a client cannot be created again in another process."""
        return self._given_client is not None or self._given_async_client is not None

    def run(self, steps: Steps[T]) -> T:
        """Take the steps of a call, and return its result."""
        return run_steps(steps, self._take)

    async def arun(self, steps: Steps[T]) -> T:
        """Do the same as `run` without blocking the event loop."""
        return await arun_steps(steps, self._atake)

    def close(self) -> None:
        """Reject new sync calls, and close their connections as soon as no thread uses them."""
        with self._lock:
            self._is_closed = True
            client, self._client = self._client, None
            is_unused = client is not None and client.is_own and client.num_calls == 0
        if client is not None and is_unused:
            client.client.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        with self._lock:
            client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _take(self, step: Send) -> Outcome:
        deadline = None if step.timeout_s is None else time.monotonic() + step.timeout_s
        try:
            with (
                self._sync_client() as client,
                client.stream("POST", self._url, **self._options(step)) as response,
            ):
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    # The timeout of the client applies to each read, not to all of them together.
                    if deadline is not None and time.monotonic() > deadline:
                        return httpx.ReadTimeout("the response took too long")
                return Answer(response.status_code, response.headers, bytes(content))
        except httpx.DecodingError:
            raise_unusable()
        except httpx.RequestError as error:
            return error

    async def _atake(self, step: Send) -> Outcome:
        client = self._async_client()
        try:
            response = await asyncio.wait_for(client.post(self._url, **self._options(step)), step.timeout_s)
            return Answer(response.status_code, response.headers, response.content)
        except RuntimeError:
            # Before Python 3.12, `wait_for` sends in another task, and `aclose` may run before it.
            if not client.is_closed:
                raise
            raise ScorerClosedError(_CLOSED_DURING_CALL) from None
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            return httpx.ReadTimeout("the response took too long")
        except httpx.DecodingError:
            raise_unusable()
        except httpx.RequestError as error:
            return error

    def _options(self, step: Send) -> dict[str, Any]:
        headers = {"content-type": "application/json", **self._key.headers()}
        return {"content": step.content, "headers": headers, "timeout": step.timeout_s}

    @contextmanager
    def _sync_client(self) -> Iterator[httpx.Client]:
        if self._given_client is not None:
            _check_usable(self._given_client)
            yield self._given_client
            return
        shared = self._join_client()
        try:
            yield shared.client
        except Exception:
            raise
        except BaseException:
            # Ctrl-C may have left a lock of the connection pool taken, so later calls use another client.
            with self._lock:
                if self._client is shared:
                    self._client = None
            raise
        finally:
            with self._lock:
                shared.num_calls -= 1
                is_last = self._is_closed and shared.num_calls == 0
            if is_last:
                shared.client.close()

    def _join_client(self) -> _SharedClient:
        """Return the client of this process, and count a call that uses it."""
        spare: _SharedClient | None = None
        while True:
            with self._lock:
                if self._is_closed:
                    raise ScorerClosedError(_CLOSED_DURING_CALL)
                # A forked child process must not write into the connections of its parent.
                if spare is not None and (self._client is None or not self._client.is_own):
                    self._client, spare = spare, None
                if self._client is not None and self._client.is_own:
                    self._client.num_calls += 1
                    return self._client
            # Outside the lock, since this takes long. A process that is forked meanwhile inherits the lock.
            spare = _SharedClient()

    def _async_client(self) -> httpx.AsyncClient:
        if self._given_async_client is not None:
            _check_usable(self._given_async_client)
            return self._given_async_client
        loop = asyncio.get_running_loop()
        client = self._async_clients.get(loop)
        if client is None:
            client = _create(httpx.AsyncClient)
            with self._lock:
                for other in list(self._async_clients):
                    if other.is_closed():
                        del self._async_clients[other]
                self._async_clients[loop] = client
        return client


class _SharedClient:
    """A client of this process, and the number of calls that are using it."""

    def __init__(self) -> None:
        self.client = _create(httpx.Client)
        self.num_calls = 0
        self._process = os.getpid()

    @property
    def is_own(self) -> bool:
        """Whether this process created the client."""
        return self._process == os.getpid()


def _create(kind: Callable[..., Client]) -> Client:
    """Create a client that keeps no cookies. A server may set a cookie that cannot be sent back.

    Raises:
        ConfigError: A proxy or certificate that the environment names cannot be used.
    """
    try:
        return kind(cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())))
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        # The message of an invalid URL may contain a part of the proxy's password.
        reason = type(error).__name__ if isinstance(error, httpx.InvalidURL) else error
        raise ConfigError(
            f"the HTTP client cannot be created; check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and "
            f"SSL_CERT_FILE in the environment ({reason})"
        ) from error


def _check_usable(client: httpx.Client | httpx.AsyncClient) -> None:
    if client.is_closed:
        raise ScorerClosedError("the client that this scorer was given is closed")
