"""The OpenAPI document, generated from the table of dialects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from bge_rerank_integrations import __version__
from bge_rerank_integrations.server.dialects.dialect import Dialect
from bge_rerank_integrations.server.dialects.table import DIALECTS

_PROBES: Final = {
    "/health/live": "Whether the process can rank requests, now or when the model is loaded.",
    "/health/ready": "Whether requests are accepted now.",
    "/metrics": "Metrics for Prometheus.",
    "/v1/models": "The model of the server.",
}
_WITH_KEY: Final = frozenset({"/v1/models"})
_REFUSALS: Final = {
    "400": "The request is malformed.",
    "401": "The API key is missing or wrong.",
    "408": "The body did not arrive in time.",
    "413": "The body is larger than the server's limit.",
    "415": "The compression of the body is unknown.",
    "422": "The request is malformed (Text Embeddings Inference).",
    "429": "The queue is full. The header `Retry-After` has the seconds to wait.",
    "503": "The model is being loaded, or the server is shutting down.",
    "504": "The request was not finished in time.",
}


def openapi_document() -> dict[str, Any]:
    """Return the description of all endpoints as an OpenAPI 3.1 document."""
    paths: dict[str, Any] = {path: {"post": _operation(dialects)} for path, dialects in DIALECTS.items()}
    for path, text in _PROBES.items():
        statuses = ["401", "503"] if path in _WITH_KEY else ["503"]
        responses = {"200": {"description": text}}
        responses |= {status: {"description": _REFUSALS[status]} for status in statuses}
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
                        **{name: {"type": "string"} for name in ("message", "detail", "type")},
                        "index": {"type": "integer", "description": "position of the invalid item"},
                    },
                    "required": ["message", "detail", "error", "type"],
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
