"""The dialects of each path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect
from bge_rerank_integrations.server.dialects.native import NATIVE
from bge_rerank_integrations.server.dialects.nvidia import NVIDIA
from bge_rerank_integrations.server.dialects.rerank import INFINITY, RERANK
from bge_rerank_integrations.server.dialects.score import SCORE
from bge_rerank_integrations.server.dialects.tei import TEI
from bge_rerank_integrations.server.dialects.voyage import VOYAGE
from bge_rerank_integrations.server.refusal import Refusal

_ALL_SHAPES: Final = (TEI, VOYAGE, RERANK)

DIALECTS: Final[Mapping[str, Sequence[Dialect]]] = {
    "/": (TEI,),
    "/rerank": _ALL_SHAPES,
    "/v1/rerank": _ALL_SHAPES,
    "/v2/rerank": _ALL_SHAPES,
    "/infinity/rerank": (INFINITY,),
    "/voyage/v1/rerank": (VOYAGE,),
    "/score": (SCORE,),
    "/v1/score": (SCORE,),
    "/ranking": (NVIDIA,),
    "/v1/ranking": (NVIDIA,),
    "/v1/rank": (NATIVE,),
}
"""The dialects of each path. The first dialect that matches a body reads it, or else the last dialect."""


def choose(dialects: Sequence[Dialect], body: Body) -> Dialect:
    """Return the dialect of a request body."""
    return next((dialect for dialect in dialects if dialect.matches(body)), dialects[-1])


def error_body(dialect: Dialect, refusal: Refusal) -> dict[str, Any]:
    """Return the body for a refused request, with the message in every field that clients read."""
    body = {
        "message": refusal.message,
        "detail": refusal.message,
        "error": dialect.error(refusal),
        "error_type": _ERROR_TYPES.get(refusal.status, "Validation"),
        "type": refusal.type,
    }
    return body if refusal.index is None else {**body, "index": refusal.index}


# The names that Text Embeddings Inference uses.
_ERROR_TYPES: Final[Mapping[int, str]] = {
    401: "Unauthorized",
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Backend",
}
