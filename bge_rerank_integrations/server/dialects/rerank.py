"""The format of Cohere, Jina, vLLM and Infinity: requests with `documents`, responses with `results`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, openai_error
from bge_rerank_integrations.server.dialects.fields import (
    ACTIVATION_SCHEMA,
    COUNT_SCHEMA,
    DOCUMENTS_SCHEMA,
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
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

_FIELDS: Final = {
    "model": MODEL_SCHEMA,
    "query": TEXT_SCHEMA,
    "documents": DOCUMENTS_SCHEMA,
    "top_n": COUNT_SCHEMA,
    "return_documents": RETURN_TEXTS_SCHEMA,
    "raw_scores": RAW_SCORES_SCHEMA,
    "use_activation": ACTIVATION_SCHEMA,
    "rank_fields": RANK_FIELDS_SCHEMA,
}


def _parse(body: Body) -> Work:
    documents = read_texts(body, "documents", read_rank_fields(body))
    return Work(
        requests=[(read_text(body, "query"), documents)],
        top_n=read_count(body, "top_n"),
        raw_scores=read_raw_scores(body),
        return_documents=read_flag(body, "return_documents"),
        model=read_model(body),
    )


def _render(reply: Reply) -> dict[str, Any]:
    return _response(reply, lambda text: {"text": text})


def _render_infinity(reply: Reply) -> dict[str, Any]:
    return _response(reply, lambda text: text)


def _response(reply: Reply, document: Callable[[str], Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": reply.num_tokens, "output_tokens": 0},
    }
    if reply.warnings:
        meta["warnings"] = reply.warnings
    return {
        "id": reply.id,
        "object": "rerank",
        "created": reply.created,
        "model": reply.model,
        "results": results_of(reply, document),
        "usage": reply.usage,
        "meta": meta,
    }


def results_of(reply: Reply, document: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Return the result of each passage. `document` makes the returned document from its text."""
    (_, texts), ranking = reply.work.requests[0], reply.rankings[0]
    results = []
    for passage in ranking:
        result: dict[str, Any] = {"index": passage.index, "relevance_score": passage.score}
        # Some clients fail on null. A field that does not apply is therefore left out.
        if reply.work.return_documents:
            result["document"] = document(texts[passage.index])
        if passage.truncated:
            result["truncated"] = True
        results.append(result)
    return results


_EXAMPLE: Final = {"query": EXAMPLE_QUERY, "documents": EXAMPLE_TEXTS, "top_n": 1}

RERANK: Final = Dialect(
    name="rerank",
    parse=_parse,
    render=_render,
    error=openai_error,
    fields=_FIELDS,
    example=_EXAMPLE,
    required=("query", "documents"),
)
INFINITY: Final = Dialect(
    name="infinity",  # returns documents as strings, while the others return objects
    parse=_parse,
    render=_render_infinity,
    error=openai_error,
    fields=_FIELDS,
    example=_EXAMPLE,
    required=("query", "documents"),
)
