"""`create_app`: the ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from http import HTTPStatus

from bge_rerank_integrations.errors import missing_extra

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Match, Route
except ImportError as error:
    raise missing_extra("server", "starlette") from error

from bge_rerank_integrations.errors import ConfigError, RerankError
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.server.dialects.rerank import RERANK
from bge_rerank_integrations.server.dialects.table import DIALECTS, error_body
from bge_rerank_integrations.server.endpoint import (
    KeyCheck,
    RerankEndpoint,
    read_headers,
    refusal_headers,
    request_id,
)
from bge_rerank_integrations.server.pages import page_routes
from bge_rerank_integrations.server.probes import information_routes, probe_routes
from bge_rerank_integrations.server.refusal import Refusal, refusal_of
from bge_rerank_integrations.server.service import Service
from bge_rerank_integrations.server.settings import ServerSettings


def create_app(scorer: Scorer | Future[Scorer], settings: ServerSettings | None = None) -> Starlette:
    """Return an ASGI application that answers all request formats, for uvicorn or any other ASGI server.

    The application has no global state. It does not warm up or close the scorer. `app.state.service` is the
    `Service` that ranks the requests. Its method `drain` finishes the accepted requests.

    Args:
        scorer: A scorer with `normalize=False`, or the future of such a scorer. Until the future is done,
            requests and `/health/ready` get status 503.
        settings: The API key and the limits. None uses the defaults, which require no key.

    Returns:
        The application.

    Raises:
        ConfigError: The scorer was created with `normalize=True`.
        MissingExtraError: The extra `server` is not installed.

    Example:
        >>> scorer = Scorer("embedded")
        >>> scorer.warmup()
        >>> app = create_app(scorer, ServerSettings(api_key="secret"))
    """
    if isinstance(scorer, Scorer) and scorer.config.normalize:
        raise ConfigError("the server's scorer must have normalize=False; each request chooses its scale")
    settings = settings or ServerSettings()
    service = Service(scorer)
    check_key = KeyCheck(settings.api_key)
    endpoints = [
        Route(path, RerankEndpoint(path, dialects, service, settings, check_key), methods=["POST"])
        for path, dialects in DIALECTS.items()
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.begin_drain()

    app = Starlette(
        routes=[
            *endpoints,
            *probe_routes(service, settings),
            *information_routes(service, settings, check_key),
            *page_routes(),
        ],
        exception_handlers={HTTPException: _refuse, Refusal: _refuse, RerankError: _refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Respond to an error of a route that does not exist, or of a route that only reads."""
    refusal = refusal_of(error)
    headers = {"x-request-id": request_id(read_headers(request.scope))}
    if isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, error.detail, "HttpError")
        headers |= error.headers or {}
        if refusal.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = _allowed_methods(request)
    return JSONResponse(
        error_body(RERANK, refusal),
        status_code=refusal.status,
        headers={**headers, **refusal_headers(refusal)},
    )


def _allowed_methods(request: Request) -> str:
    """Return the methods of all routes with the path of a request. Starlette names those of the first one."""
    routes = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted(set().union(*(route.methods for route in routes))))
