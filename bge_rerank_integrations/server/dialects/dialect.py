"""`Dialect`: how a format reads requests, and how it renders responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.server.refusal import Refusal

Body = Mapping[str, Any]
"""A parsed JSON object."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The content of a request, in the form that is common to all dialects.

    Attributes:
        requests: (query, passages) pairs. Most dialects have exactly one.
        top_n: Maximum number of passages to return for each request. None returns all.
        raw_scores: Return logits instead of scores from 0 to 1.
        only_scores: Score every pair as `Scorer.score` does, without the counts of a `Ranking`.
        return_documents: Return the texts with the scores.
        refuse_truncated: Refuse the request if a passage or query is too long, instead of truncating it.
        timeout_s: Time in seconds that the client waits. None uses the limit of the server.
        model: The name of the model in the request.
    """

    requests: Sequence[tuple[str, list[str]]]
    top_n: int | None = None
    raw_scores: bool = False
    only_scores: bool = False
    return_documents: bool = False
    refuse_truncated: bool = False
    timeout_s: float | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The content of a response, in the form that is common to all dialects.

    Attributes:
        id: Request id.
        created: Unix time in seconds.
        model: Name of the model.
        max_length: Maximum length of a pair in tokens.
        work: The content of the request.
        rankings: One ranking for each request of the work.
    """

    id: str
    created: int
    model: str
    max_length: int
    work: Work
    rankings: Sequence[Ranking]

    @property
    def num_pairs(self) -> int:
        """Number of pairs in the request."""
        return sum(len(passages) for _, passages in self.work.requests)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model read."""
        return sum(ranking.num_tokens for ranking in self.rankings)

    @property
    def num_truncated(self) -> int:
        """Number of passages that lost tokens."""
        return sum(ranking.num_truncated for ranking in self.rankings)

    @property
    def num_truncated_queries(self) -> int:
        """Number of queries that lost tokens."""
        return sum(ranking.num_truncated_queries for ranking in self.rankings)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of pairs, tokens and truncated passages, as far as they are known."""
        if self.work.only_scores:
            return {"pairs": self.num_pairs}
        return {"pairs": self.num_pairs, "tokens": self.num_tokens, "truncated": self.num_truncated}

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens, under the names that most clients read."""
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}

    @property
    def warnings(self) -> list[str]:
        """Messages about truncated documents and queries."""
        counts = (
            (self.num_truncated, self.num_pairs, "documents"),
            (self.num_truncated_queries, len(self.rankings), "queries"),
        )
        return [
            f"{num_truncated} of {num_sent} {what} were truncated: a query and a document have "
            f"{self.max_length} tokens at most"
            for num_truncated, num_sent, what in counts
            if num_truncated
        ]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One format of requests and responses.

    Attributes:
        name: Name of the dialect in logs and in the OpenAPI document.
        parse: Reads a request. It raises `InputError` if the request is malformed.
        render: Returns the body of the response.
        error: Returns the value of the field `error` in the response to a refused request.
        fields: JSON schema of each field of a request.
        example: A request that works, for the OpenAPI document.
        required: Names of the required fields.
        matches: Returns whether a request is in this dialect. It is used if several dialects share a path.
        invalid_status: HTTP status of the response to a malformed request.
    """

    name: str
    parse: Callable[[Body], Work]
    render: Callable[[Reply], Any]
    error: Callable[[Refusal], Any]
    fields: Mapping[str, Any]
    example: Mapping[str, Any]
    required: Sequence[str] = field(default=())
    matches: Callable[[Body], bool] = lambda _: True
    invalid_status: int = 400


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """Return the nested error object of OpenAI's API, which vLLM and Infinity use too."""
    return {"message": refusal.message, "type": refusal.type, "param": None, "code": refusal.status}


def plain_error(refusal: Refusal) -> str:
    """Return the message."""
    return refusal.message
