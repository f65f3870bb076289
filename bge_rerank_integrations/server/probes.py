"""Endpoints that only read: health, metrics, the list of models and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bge_rerank_integrations.server.endpoint import KeyCheck, model_name, read_headers
from bge_rerank_integrations.server.openapi import openapi_document
from bge_rerank_integrations.server.service import Service
from bge_rerank_integrations.server.settings import ServerSettings
from bge_rerank_integrations.telemetry import prometheus_exposition


def probe_routes(service: Service, settings: ServerSettings) -> list[Route]:
    """Return the routes that need no key: `/health`, `/health/ready`, `/health/live`, `/metrics`."""

    async def live(_: Request) -> Response:
        return _health(is_ok=service.is_live, service=service)

    async def ready(_: Request) -> Response:
        return _health(is_ok=service.is_ready, service=service)

    async def metrics(_: Request) -> Response:
        scorer = service.scorer
        name = None if scorer is None else model_name(settings, scorer.config.model)
        content, content_type = prometheus_exposition(scorer, model_name=name)
        return Response(content, headers={"content-type": content_type})

    return [
        Route("/health", ready),
        Route("/health/ready", ready),
        Route("/health/live", live),
        Route("/metrics", metrics),
    ]


def information_routes(service: Service, settings: ServerSettings, check_key: KeyCheck) -> list[Route]:
    """Return the routes that need the key: `/v1/models`, `/models`, `/openapi.json`."""

    def guarded(read: Callable[[], Any]) -> Any:
        async def respond(request: Request) -> Response:
            check_key(read_headers(request.scope))
            return JSONResponse(read())

        return respond

    def models() -> dict[str, Any]:
        name = model_name(settings, service.require_scorer().config.model)
        model = {"id": name, "object": "model", "created": 0, "owned_by": "bge-rerank-integrations"}
        return {"object": "list", "data": [model]}

    return [
        Route("/v1/models", guarded(models)),
        Route("/models", guarded(models)),
        Route("/openapi.json", guarded(openapi_document)),
    ]


def _health(*, is_ok: bool, service: Service) -> Response:
    scorer = service.scorer
    body: dict[str, Any] = {"status": "ok" if is_ok else "unavailable"}
    if scorer is not None:
        health = scorer.health()
        body |= {"queued_requests": health.queued_requests, "queued_tokens": health.queued_tokens}
    return JSONResponse(body, status_code=200 if is_ok else 503, headers={"cache-control": "no-store"})
