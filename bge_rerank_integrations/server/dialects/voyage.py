"""The format of Voyage: requests with `top_k` and `truncation`, responses with `data`."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, plain_error
from bge_rerank_integrations.server.dialects.fields import (
    COUNT_SCHEMA,
    DOCUMENTS_SCHEMA,
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
    FLAG_SCHEMA,
    MODEL_SCHEMA,
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
    (_, texts), ranking = reply.work.requests[0], reply.rankings[0]
    results: list[dict[str, Any]] = []
    for passage in ranking:
        result: dict[str, Any] = {"index": passage.index, "relevance_score": passage.score}
        if reply.work.return_documents:
            result["document"] = texts[passage.index]
        if passage.truncated:
            result["truncated"] = True
        results.append(result)
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
        "truncation": {**FLAG_SCHEMA, "description": "false refuses texts that are too long"},
        "return_documents": RETURN_TEXTS_SCHEMA,
    },
    example={"query": EXAMPLE_QUERY, "documents": EXAMPLE_TEXTS, "top_k": 1},
    required=("query", "documents"),
    matches=lambda body: "top_k" in body or "truncation" in body,
)
