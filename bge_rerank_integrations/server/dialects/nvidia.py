"""The format of NVIDIA NIM: requests with `passages`, responses with `rankings` of logits."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, plain_error
from bge_rerank_integrations.server.dialects.fields import (
    DOCUMENTS_SCHEMA,
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
    MODEL_SCHEMA,
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
        "model": MODEL_SCHEMA,
        "query": {"anyOf": [TEXT_SCHEMA, {"type": "object", "properties": {"text": TEXT_SCHEMA}}]},
        "passages": DOCUMENTS_SCHEMA,
        "truncate": {
            "type": ["string", "null"],
            "enum": ["NONE", "START", "END", None],
            "description": "NONE refuses texts that are too long; the others cut the end",
        },
    },
    example={
        "query": {"text": EXAMPLE_QUERY},
        "passages": [{"text": text} for text in EXAMPLE_TEXTS],
    },
    required=("query", "passages"),
)
