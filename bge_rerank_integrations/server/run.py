"""Runs the application with uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

from bge_rerank_integrations.errors import ConfigError, missing_extra

try:
    import uvicorn
except ImportError as error:
    raise missing_extra("server", "uvicorn") from error

from bge_rerank_integrations.runtime.shutdown import join_until
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.server.app import create_app
from bge_rerank_integrations.server.settings import ServerSettings, check_seconds

logger = logging.getLogger("bge_rerank_integrations.server")

_BACKLOG: Final = 2048
# Time in seconds that clients have to read their responses after the drain.
_LAST_RESPONSES_S: Final = 2
# Time in seconds to wait for a model that is still being loaded when the server ends. No request needs it.
_LOAD_ENDS_S: Final = 1.0
# Seconds that an idle connection stays open. A client that sends on a connection in the moment in which the
# server closes it gets no response, so clients and load balancers must close first. They do after 5 to 60 s.
_KEEP_ALIVE_S: Final = 75
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
# More open files than any number of connections that one process serves.
_MAX_OPEN_FILES: Final = 1 << 16


def run_server(
    load: Callable[[], Scorer],
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    grace_s: float,
    on_listening: Callable[[str], object],
) -> None:
    """Listen, load the model in another thread, and serve until SIGTERM or SIGINT.

    After the signal, the server accepts no new requests, and finishes the accepted ones within `grace_s`
    seconds. A second signal ends the accepted requests with status 503.

    Args:
        load: Loads and returns the scorer, in another thread. The scorer is closed at the end.
        settings: The settings of the application.
        host: Address to listen on.
        port: Port to listen on. 0 chooses a free port.
        grace_s: Maximum time in seconds to finish accepted requests.
        on_listening: Called with the URL of the server.

    Raises:
        ConfigError: The server cannot listen on the address.
        RerankError: The model cannot be loaded; see `Scorer`.
    """
    check_seconds("grace_s", grace_s)
    _allow_many_connections()
    logging.getLogger("uvicorn.error").addFilter(_is_no_upgrade)
    loading: Future[Scorer] = Future()
    app = create_app(loading, settings)
    config = uvicorn.Config(
        app,
        # With an `Upgrade` header, such as that of Java's HTTP client, httptools would drop the body.
        http="h11",
        log_config=None,
        access_log=False,  # it would contain query strings
        lifespan="on",
        server_header=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_RESPONSES_S,
    )
    with _listen(host, port) as listener:
        url = _url(listener)
        server = _Server(config, app.state.service.drain, grace_s, lambda: on_listening(url))
        loader = threading.Thread(
            target=_load, args=(load, loading, server), name="bge-rerank-load", daemon=True
        )
        with _signals_end(server):
            loader.start()
            server.run(sockets=[listener])
            if not join_until([loader], time.monotonic() + min(grace_s, _LOAD_ENDS_S)):
                # The process got a signal while it loads the model. Loading cannot be interrupted, and a
                # regular exit of the interpreter while a native library runs would abort the process.
                _exit()
            loading.result().close(timeout=grace_s)


class _Server(uvicorn.Server):
    """Drains the service at the first signal, and ends with status 0. The second signal ends the drain.

    uvicorn itself would stop listening immediately, so that clients and probes would get no response. It
    would also raise the signal again at the end.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[float], Awaitable[int]],
        grace_s: float,
        on_listening: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._drain = drain
        self._grace_s = grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0
        self._has_failed = False
        self._endings: list[asyncio.Future[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()
        self._loop = asyncio.get_running_loop()
        if self._has_failed:
            # Some releases of uvicorn do not shut down if `should_exit` is set before `startup` returns.
            self._loop.call_soon(self._stop)
        if self._num_signals:
            self._begin_to_end()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._num_signals += 1
        if self._loop is None:
            return  # `startup` sees the signal. Some releases of uvicorn clean up only after it.
        if self._loop.is_closed():  # all requests have ended
            _exit()
        elif self._num_signals > 2:
            self._stop()
        else:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def fail(self) -> None:
        """End the server without a drain. Any thread can call this."""
        self._has_failed = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    def _begin_to_end(self) -> None:
        self._endings.append(asyncio.ensure_future(self._end(len(self._endings) + 1)))

    async def _end(self, number: int) -> None:
        grace_s = self._grace_s if self._num_signals == 1 else 0.0
        logger.info("shutting down: finishing accepted requests, for at most %g s", grace_s)
        num_cancelled = await self._drain(grace_s)
        if number < len(self._endings):
            return  # a second signal has ended the drain
        logger.info("shut down: %d request(s) were not finished in time", num_cancelled)
        self._stop()


@contextmanager
def _signals_end(server: _Server) -> Iterator[None]:
    """Make SIGINT and SIGTERM end the server before uvicorn sets its handlers, and after it removes them.

    Before uvicorn sets them, this thread and the loading thread import modules. Python's own handler raises
    `KeyboardInterrupt`. Inside the import system, Python may drop this exception and never release the lock
    of imports. The loading thread would then wait for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers
        return
    handlers = {number: signal.signal(number, server.handle_exit) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit() -> None:
    """End the process at once with status 0."""
    logging.shutdown()
    os._exit(0)


def _is_no_upgrade(record: logging.LogRecord) -> bool:
    """Leave out uvicorn's warnings about each client that offers another protocol than HTTP/1.1."""
    return not record.getMessage().startswith(
        ("Unsupported upgrade request", "No supported WebSocket library")
    )


def _load(load: Callable[[], Scorer], loading: Future[Scorer], server: _Server) -> None:
    try:
        scorer = load()
    except BaseException as error:  # raised again in the main thread
        loading.set_exception(error)
        server.fail()
    else:
        loading.set_result(scorer)
        logger.info("ready")


def _allow_many_connections() -> None:
    """Raise the limit of open files as far as the system allows: each connection is an open file.

    The usual limit is 1,024. That many idle clients would keep all others out.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    takes_both = host == "::" and socket.has_dualstack_ipv6()  # IPv4 too
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=takes_both)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host!r}, port {port}: {reason}") from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
