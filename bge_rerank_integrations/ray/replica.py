"""One replica of the Serve deployment: a scorer behind the HTTP application and behind a handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bge_rerank_integrations.errors import missing_extra

try:
    from ray import serve
    from starlette.responses import JSONResponse
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import (
    DeviceLostError,
    InputError,
    QueueFullError,
    RequestTimeoutError,
    RerankError,
    ScorerClosedError,
    ServerUnreachableError,
)
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.ray.request_body import RequestBody
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.server.app import create_app
from bge_rerank_integrations.server.body import Receive
from bge_rerank_integrations.server.dialects.dialect import Work
from bge_rerank_integrations.server.dialects.rerank import RERANK
from bge_rerank_integrations.server.dialects.table import error_body
from bge_rerank_integrations.server.endpoint import Scope, Send, refusal_headers
from bge_rerank_integrations.server.refusal import Refusal, refusal_of
from bge_rerank_integrations.server.service import Service
from bge_rerank_integrations.server.settings import ServerSettings, read_api_key

logger = logging.getLogger("bge_rerank_integrations.ray")

_App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Admission:
    """Counts the requests of a replica, and refuses those beyond a limit."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_requests = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count one request while it runs.

        Raises:
            QueueFullError: The replica already has as many requests as it may.
        """
        if self._num_requests >= self._max_requests:
            raise QueueFullError(f"this replica already has {self._max_requests} requests")
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1


@serve.ingress()
class RerankReplica:
    """Loads a scorer when it starts, and serves it over HTTP and over a `DeploymentHandle`.

    Args:
        config: The settings of the scorer.
        api_key_file: File with the API key on this replica's machine. None takes the key from the environment
            variable `BGE_RERANK_API_KEY`.
        settings: Limits of the HTTP application. The key is not part of them, since Ray stores the arguments
            of a replica.
        max_requests: Maximum number of requests that the replica works on. It refuses more with status 429.
    """

    def __init__(
        self,
        config: ScorerConfig,
        api_key_file: str | None,
        settings: dict[str, Any],
        max_requests: int,
    ) -> None:
        api_key = read_api_key(None if api_key_file is None else Path(api_key_file))
        if api_key is None:
            logger.warning(
                "no API key is set, so everyone who can reach the HTTP port of Ray Serve can use the model"
            )
        self._scorer = Scorer.from_config(config)
        self._scorer.warmup()
        self._http = create_app(self._scorer, ServerSettings(api_key=api_key, **settings))
        self._service: Service = self._http.state.service
        self._admission = _Admission(max_requests)

    def __serve_build_asgi_app__(self) -> _App:
        """Return the application that answers HTTP requests."""
        http, admission = self._http, self._admission

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await http(scope, receive, send)
                return
            try:
                with admission.admit():
                    await http(scope, RequestBody(scope, receive), send)
            except QueueFullError as error:
                await _refuse(error)(scope, receive, send)

        return app

    async def check_health(self) -> None:
        """Raise if the replica can no longer score. Ray Serve then replaces it.

        Raises:
            DeviceLostError: The device has failed.
        """
        if not self._service.is_live:
            raise DeviceLostError("the device of this replica failed")

    async def rank(
        self,
        requests: Sequence[tuple[str, list[str]]],
        *,
        top_n: int | None,
        only_scores: bool,
        timeout_s: float | None,
    ) -> list[Ranking]:
        """Rank requests that came over a handle.

        Args:
            requests: (query, passages) of each request, checked by the caller.
            top_n: Maximum number of passages to return for each request. None returns all.
            only_scores: Score every pair as `Scorer.score` does.
            timeout_s: Maximum duration in seconds. None means no limit.

        Returns:
            One ranking of raw logits for each request.

        Raises:
            QueueFullError: The replica has too many requests.
            ServerUnreachableError: The replica is shutting down.
            RequestTimeoutError: The timeout has expired.
            RerankError: `Scorer.rank` raises it.
        """
        work = Work(requests=requests, top_n=top_n, raw_scores=True, only_scores=only_scores)
        try:
            with self._admission.admit():
                return await asyncio.wait_for(self._service.rank(work), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            raise RequestTimeoutError("the replica did not finish within the timeout") from None
        except ScorerClosedError:
            raise ServerUnreachableError("the replica is shutting down") from None
        except Refusal as refusal:
            raise _error_of(refusal) from None


def _refuse(error: QueueFullError) -> JSONResponse:
    refusal = refusal_of(error)
    headers = {**refusal_headers(refusal), "cache-control": "no-store"}
    return JSONResponse(error_body(RERANK, refusal), status_code=refusal.status, headers=headers)


def _error_of(refusal: Refusal) -> RerankError:
    kind = ServerUnreachableError if refusal.status == 503 else InputError
    return kind(refusal.message)
