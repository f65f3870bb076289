"""What a dialect is: what it reads from a request, and what it makes of the rankings."""

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
    """What a request asks for, in no dialect.

    Attributes:
        requests: (query, passages) pairs; most dialects have one.
        top_n: Most passages to return of each request; None returns all.
        raw_scores: Return logits instead of scores from 0 to 1.
        only_scores: Score every pair, as `Scorer.score` does, and count nothing.
        return_documents: Return the texts with the scores.
        refuse_truncated: Refuse the request if a passage or query is too long, instead of truncating it.
        timeout_s: Most seconds the client waits; None leaves it to the server.
        model: The model that the client named.
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
    """What a response is made of.

    Attributes:
        id: The request's id.
        created: Unix time in seconds.
        model: Name of the model.
        max_length: Longest pair in tokens.
        work: What was asked for.
        rankings: One for each request of the work.
    """

    id: str
    created: int
    model: str
    max_length: int
    work: Work
    rankings: Sequence[Ranking]

    @property
    def num_pairs(self) -> int:
        """Number of pairs that were sent."""
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
    def usage(self) -> dict[str, int]:
        """Token counts under the names that most clients read."""
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}

    @property
    def warnings(self) -> list[str]:
        """Sentences about what was truncated."""
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
    """One wire format.

    Attributes:
        name: What logs and the OpenAPI document call it.
        parse: Reads a request; raises `InputError` for one that is malformed.
        render: Makes the response.
        error: Makes the value of `error` in a refused request's response.
        fields: JSON schema of each request field.
        example: A request that works, for the OpenAPI document.
        required: Names of the fields that a request must have.
        matches: Whether a request is in this dialect, where several share a path.
        invalid_status: HTTP status of a malformed request.
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
    """Return the nested error object of OpenAI's API, which vLLM and Infinity have too."""
    return {"message": refusal.message, "type": refusal.type, "param": None, "code": refusal.status}


def plain_error(refusal: Refusal) -> str:
    """Return the message alone."""
    return refusal.message
