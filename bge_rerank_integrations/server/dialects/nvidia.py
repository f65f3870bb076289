"""The format of NVIDIA NIM: requests with `passages`, responses with `rankings` of logits."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, plain_error
from bge_rerank_integrations.server.dialects.fields import (
    DOCUMENTS_SCHEMA,
    TEXT_SCHEMA,
    read_model,
    read_text,
    read_texts,
)


def _parse(body: Body) -> Work:
    return Work(
        requests=[(read_text(body, "query"), read_texts(body, "passages"))],
        raw_scores=True,
        refuse_truncated=body.get("truncate") == "NONE",
        model=read_model(body),
    )


def _render(reply: Reply) -> dict[str, Any]:
    return {
        "model": reply.model,
        "rankings": [{"index": passage.index, "logit": passage.score} for passage in reply.rankings[0]],
        "usage": reply.usage,
    }


NVIDIA: Final = Dialect(
    name="nvidia",
    parse=_parse,
    render=_render,
    error=plain_error,
    fields={
        "model": {"type": ["string", "null"]},
        "query": {"anyOf": [TEXT_SCHEMA, {"type": "object", "properties": {"text": TEXT_SCHEMA}}]},
        "passages": DOCUMENTS_SCHEMA,
        "truncate": {"enum": ["NONE", "START", "END", None]},
    },
    required=("query", "passages"),
)
