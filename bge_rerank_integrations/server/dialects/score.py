"""The format of vLLM's `/score`: one score for each pair, in the order of the pairs."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations.errors import InputError
from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, openai_error
from bge_rerank_integrations.server.dialects.fields import (
    ACTIVATION_SCHEMA,
    DOCUMENTS_SCHEMA,
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
    MODEL_SCHEMA,
    TEXT_SCHEMA,
    read_flag,
    read_model,
    read_text,
    read_texts,
)

# Names of the two fields in different versions of vLLM.
_NAMES: Final = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
_TEXTS_SCHEMA: Final = {"anyOf": [TEXT_SCHEMA, DOCUMENTS_SCHEMA]}


def _parse(body: Body) -> Work:
    first, second = next((names for names in _NAMES if names[0] in body), _NAMES[0])
    queries, passages = _side(body, first), _side(body, second)
    if len(queries) == 1:
        requests = [(queries[0], passages)]
    elif len(queries) == len(passages):
        requests = [(query, [passage]) for query, passage in zip(queries, passages, strict=True)]
    else:
        raise InputError(
            f"{first!r} must have one text, or as many texts as {second!r}; they have {len(queries)} and "
            f"{len(passages)}"
        )
    return Work(
        requests=requests,
        raw_scores=not read_flag(body, "use_activation", default=True),
        model=read_model(body),
    )


def _side(body: Body, name: str) -> list[str]:
    return read_texts(body, name) if isinstance(body.get(name), list) else [read_text(body, name)]


def _render(reply: Reply) -> dict[str, Any]:
    in_order = [
        passage for ranking in reply.rankings for passage in sorted(ranking, key=lambda each: each.index)
    ]
    data = [
        {"index": index, "object": "score", "score": passage.score} for index, passage in enumerate(in_order)
    ]
    return {
        "id": reply.id,
        "object": "list",
        "created": reply.created,
        "model": reply.model,
        "data": data,
        "usage": reply.usage,
    }


SCORE: Final = Dialect(
    name="score",
    parse=_parse,
    render=_render,
    error=openai_error,
    fields={
        "model": MODEL_SCHEMA,
        **{name: _TEXTS_SCHEMA for names in _NAMES for name in names},
        "use_activation": ACTIVATION_SCHEMA,
    },
    example={"text_1": EXAMPLE_QUERY, "text_2": EXAMPLE_TEXTS},
)
