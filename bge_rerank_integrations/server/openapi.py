"""The OpenAPI document, generated from the table of dialects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from bge_rerank_integrations import __version__
from bge_rerank_integrations.server.dialects.dialect import Dialect
from bge_rerank_integrations.server.dialects.table import DIALECTS

_IS_READY: Final = "Whether requests are accepted now."
_MODELS: Final = "The model of the server."
_PROBES: Final = {
    "/health/live": "Whether the process can rank requests, now or when the model is loaded.",
    "/health/ready": _IS_READY,
    "/health": _IS_READY,
    "/metrics": "Metrics for Prometheus.",
    "/v1/models": _MODELS,
    "/models": _MODELS,
    "/openapi.json": "This description.",
}
_WITH_KEY: Final = frozenset({"/v1/models", "/models", "/openapi.json"})
_ALWAYS_200: Final = frozenset({"/metrics", "/openapi.json"})
_NOT_LIVE: Final = "The process must be replaced: the model could not be loaded, or the device is lost."
_REFUSALS: Final = {
    "400": "The request is malformed.",
    "401": "The API key is missing or wrong.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, it has too many documents, or a document is too long for the queue.",
    "415": "The compression of the body is unknown.",
    "422": "The request is malformed (Text Embeddings Inference).",
    "429": "The queue is full. The header `Retry-After` has the seconds to wait.",
    "500": "A score is not finite, or something unexpected failed.",
    "503": "The model is being loaded, the server is shutting down, or the device is lost.",
    "504": "The request was not finished in time.",
}


def openapi_document() -> dict[str, Any]:
    """Return the description of all endpoints as an OpenAPI 3.1 document."""
    paths: dict[str, Any] = {path: {"post": _operation(dialects)} for path, dialects in DIALECTS.items()}
    for path, text in _PROBES.items():
        responses = {"200": {"description": text}}
        if path in _WITH_KEY:
            responses["401"] = {"description": _REFUSALS["401"]}
        if path not in _ALWAYS_200:
            responses["503"] = {"description": _NOT_LIVE if path == "/health/live" else _REFUSALS["503"]}
        paths[path] = {"get": {"summary": text, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "bge-rerank-integrations", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {
                "Refusal": {
                    "type": "object",
                    "properties": {
                        **{name: {"type": "string"} for name in ("message", "detail", "error_type", "type")},
                        "error": {"type": ["string", "object"], "description": "depends on the format"},
                        "index": {"type": "integer", "description": "position of the invalid item"},
                    },
                    "required": ["message", "detail", "error", "error_type", "type"],
                }
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(dialects: Sequence[Dialect]) -> dict[str, Any]:
    schemas = [
        {
            "type": "object",
            "title": dialect.name,
            "properties": dict(dialect.fields),
            "required": list(dialect.required),
        }
        for dialect in dialects
    ]
    examples = {dialect.name: {"value": dict(dialect.example)} for dialect in dialects}
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
    return {
        "summary": "Rerank passages. Formats: " + ", ".join(dialect.name for dialect in dialects),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"anyOf": schemas}, "examples": examples}},
        },
        "responses": {
            "200": {"description": "Scores.", "content": {"application/json": {"schema": {}}}},
            **{status: {"description": text, "content": refusal} for status, text in _REFUSALS.items()},
        },
    }
