"""The format of this package, for `RemoteScorer`: raw logits and all fields of a `Ranking`."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from bge_rerank_integrations.errors import InputTypeError
from bge_rerank_integrations.ranking import Ranking, check_top_n
from bge_rerank_integrations.server.dialects.dialect import Body, Dialect, Reply, Work, plain_error
from bge_rerank_integrations.server.dialects.fields import (
    EXAMPLE_QUERY,
    EXAMPLE_TEXTS,
    MODEL_SCHEMA,
    read_flag,
    read_model,
    read_number,
)
from bge_rerank_integrations.server.refusal import Refusal
from bge_rerank_integrations.validation import check_requests, check_timeout

_MAX_REQUESTS: Final = 20_000


def _parse(body: Body) -> Work:
    top_n, timeout_s = body.get("top_n"), read_number(body, "timeout_s")
    check_top_n(top_n)  # 0 means no passage, as in `Scorer.rank`
    check_timeout(timeout_s)
    requests = body.get("requests")
    if not isinstance(requests, list):
        raise InputTypeError("the field 'requests' must be a list of [query, passages] pairs")
    if len(requests) > _MAX_REQUESTS:  # also those without passages
        message = f"the body has {len(requests)} requests; the server's limit is {_MAX_REQUESTS}"
        raise Refusal(413, message, "TooManyRequests")
    only_scores = read_flag(body, "only_scores")
    return Work(
        requests=check_requests(requests, may_be_blank=only_scores),
        top_n=top_n,
        raw_scores=True,
        only_scores=only_scores,
        timeout_s=timeout_s,
        model=read_model(body),
    )


def _render(reply: Reply) -> dict[str, Any]:
    return {
        "id": reply.id,
        "model": reply.model,
        "rankings": [_only_scores(each) if reply.work.only_scores else _all(each) for each in reply.rankings],
    }


def _all(ranking: Ranking) -> dict[str, Any]:
    return {"passages": [dataclasses.asdict(passage) for passage in ranking], "counts": vars(ranking)}


def _only_scores(ranking: Ranking) -> dict[str, Any]:
    """Leave out the counts and flags, which `Scorer.score` does not give."""
    passages = [{"index": passage.index, "score": passage.score} for passage in ranking]
    return {"passages": passages, "counts": {}}


NATIVE: Final = Dialect(
    name="native",
    parse=_parse,
    render=_render,
    error=plain_error,
    fields={
        "model": MODEL_SCHEMA,
        "requests": {
            "type": "array",
            "items": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "description": "[query, passages]",
            },
        },
        "top_n": {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "null returns all, 0 returns none",
        },
        "only_scores": {
            "type": ["boolean", "null"],
            "description": "as `Scorer.score`, not as `Scorer.rank`",
        },
        "timeout_s": {"type": ["number", "null"], "minimum": 0},
    },
    example={"requests": [[EXAMPLE_QUERY, EXAMPLE_TEXTS]], "top_n": 1},
    required=("requests",),
)
