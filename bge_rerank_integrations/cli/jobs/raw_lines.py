"""Ranking the lines of a block of JSONL. This runs in the actors of a job on Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bge_rerank_integrations.cli.jobs.rank_lines import format_row
from bge_rerank_integrations.cli.jobs.requests import (
    MalformedInputError,
    MalformedLineError,
    Request,
    parse_request,
)
from bge_rerank_integrations.errors import RerankError
from bge_rerank_integrations.ray.folders import Line, ResultLine
from bge_rerank_integrations.ray.rows import rank_rows
from bge_rerank_integrations.scorer import Scorer


def rank_raw_lines(
    scorer: Scorer,
    lines: Sequence[Line],
    *,
    top_n: int | None,
    threshold: float | None,
    return_texts: bool,
    strict: bool,
) -> list[ResultLine]:
    """Rank JSONL lines. A malformed line gives a row with an error.

    Args:
        scorer: The reranker.
        lines: The lines.
        top_n: As in `Scorer.rank`.
        threshold: As in `Scorer.rank`.
        return_texts: Include each passage's text in its result.
        strict: Raise at the first malformed line.

    Returns:
        For each line, in order, `{"file": ..., "line": 1, "id": ..., "results": [...]}` as in `rank_lines`,
        or `{"file": ..., "line": 1, "error": ...}`.

    Raises:
        MalformedInputError: A line is malformed and `strict` is true.
    """
    parsed = [_parse(line) for line in lines]
    requests = [each for each in parsed if isinstance(each, Request)]
    rankings = iter(
        rank_rows(scorer, [(request.query, request.texts) for request in requests], top_n, threshold)
    )
    results = []
    for line, request in zip(lines, parsed, strict=True):
        outcome = next(rankings) if isinstance(request, Request) else request
        row: dict[str, Any] = {"file": line.file}
        if isinstance(outcome, RerankError):
            if strict:
                raise MalformedInputError(f"{line.file}, line {line.number}: {outcome}")
            row |= {"line": line.number, "error": str(outcome)}
        else:
            assert isinstance(request, Request)
            row |= format_row(request, outcome, return_texts=return_texts)
        results.append(ResultLine(json.dumps(row), "error" in row))
    return results


def _parse(line: Line) -> Request | RerankError:
    try:
        return parse_request(line.number, line.raw)
    except MalformedLineError as error:
        return RerankError(error.reason)
