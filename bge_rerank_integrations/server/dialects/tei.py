"""The format of Text Embeddings Inference: requests with `texts`, and an array as response."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, plain_error
from bge_rerank_integrations.server.dialects.fields import (
    COUNT_SCHEMA,
    DOCUMENTS_SCHEMA,
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
    FLAG_SCHEMA,
    RAW_SCORES_SCHEMA,
    RETURN_TEXTS_SCHEMA,
    TEXT_SCHEMA,
    read_count,
    read_flag,
    read_text,
    read_texts,
)


def _parse(body: Body) -> Work:
    # `truncate` is not read. Clients send its default, which is false, and their users do not expect that a
    # long text is refused.
    return Work(
        requests=[(read_text(body, "query"), read_texts(body, "texts"))],
        top_n=read_count(body, "top_n"),
        raw_scores=read_flag(body, "raw_scores"),
        return_documents=read_flag(body, "return_text"),
    )


def _render(reply: Reply) -> list[dict[str, Any]]:
    (_, texts), ranking = reply.work.requests[0], reply.rankings[0]
    results: list[dict[str, Any]] = []
    for passage in ranking:
        result: dict[str, Any] = {"index": passage.index, "score": passage.score}
        if reply.work.return_documents:
            result["text"] = texts[passage.index]
        results.append(result)
    return results


TEI: Final = Dialect(
    name="tei",
    parse=_parse,
    render=_render,
    error=plain_error,
    fields={
        "query": TEXT_SCHEMA,
        "texts": DOCUMENTS_SCHEMA,
        "top_n": {**COUNT_SCHEMA, "description": "0 and null return all; TEI itself has no such field"},
        "raw_scores": RAW_SCORES_SCHEMA,
        "return_text": RETURN_TEXTS_SCHEMA,
        "truncate": {**FLAG_SCHEMA, "description": "ignored; long texts are always cut"},
    },
    example={"query": EXAMPLE_QUERY, "texts": EXAMPLE_TEXTS},
    required=("query", "texts"),
    matches=lambda body: body.get("texts") is not None,
    invalid_status=422,
)
