"""The format of Voyage: requests with `top_k` and `truncation`, responses with `data`."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, plain_error
from bge_rerank_integrations.server.dialects.fields import (
    ACTIVATION_SCHEMA,
    COUNT_SCHEMA,
    DOCUMENTS_SCHEMA,
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
    FLAG_SCHEMA,
    MODEL_SCHEMA,
    RANK_FIELDS_SCHEMA,
    RAW_SCORES_SCHEMA,
    RETURN_TEXTS_SCHEMA,
    TEXT_SCHEMA,
    read_count,
    read_flag,
    read_model,
    read_rank_fields,
    read_raw_scores,
    read_text,
    read_texts,
)
from bge_rerank_integrations.server.dialects.rerank import results_of


def _parse(body: Body) -> Work:
    top_k, top_n = read_count(body, "top_k"), read_count(body, "top_n")
    return Work(
        requests=[(read_text(body, "query"), read_texts(body, "documents", read_rank_fields(body)))],
        top_n=top_n if top_k is None else top_k,
        raw_scores=read_raw_scores(body),
        return_documents=read_flag(body, "return_documents"),
        refuse_truncated=not read_flag(body, "truncation", default=True),
        model=read_model(body),
    )


def _render(reply: Reply) -> dict[str, Any]:
    results = results_of(reply, lambda text: text)
    # `results` is for clients of other dialects that also send `top_k`.
    return {
        "object": "list",
        "data": results,
        "results": results,
        "model": reply.model,
        "usage": reply.usage,
    }


VOYAGE: Final = Dialect(
    name="voyage",
    parse=_parse,
    render=_render,
    error=plain_error,
    fields={
        "model": MODEL_SCHEMA,
        "query": TEXT_SCHEMA,
        "documents": DOCUMENTS_SCHEMA,
        "top_k": COUNT_SCHEMA,
        "top_n": {**COUNT_SCHEMA, "description": "used without `top_k`"},
        "raw_scores": RAW_SCORES_SCHEMA,
        "use_activation": ACTIVATION_SCHEMA,
        "rank_fields": RANK_FIELDS_SCHEMA,
        "truncation": {**FLAG_SCHEMA, "description": "false refuses texts that are too long"},
        "return_documents": RETURN_TEXTS_SCHEMA,
    },
    example={"query": EXAMPLE_QUERY, "documents": EXAMPLE_TEXTS, "top_k": 1},
    required=("query", "documents"),
    matches=lambda body: "top_k" in body or "truncation" in body,
)
