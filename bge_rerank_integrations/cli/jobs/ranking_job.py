"""Ranking a file of requests: any size in bounded memory, and on from where it stopped after a kill."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from bge_rerank_integrations.cli.jobs.requests import (
    MalformedLineError,
    Request,
    no_requests,
    parse_request,
)
from bge_rerank_integrations.errors import InputError, NonFiniteScoreError
from bge_rerank_integrations.ranking import Ranking
from bge_rerank_integrations.scorer import Scorer

# Batches fill well with this many pairs at once, and a kill costs no more than scoring them.
_NUM_PAIRS_AT_ONCE: Final = 512
# Of the first line: enough to guess what an input without a request is.
_NUM_BYTES_SHOWN_TO_GUESS: Final = 1024


@dataclass
class Progress:
    """What a job has done so far.

    Attributes:
        rows: Rows written by this call.
        pairs: Pairs scored by this call.
        truncated: Of those, how many have a passage that lost tokens because it was too long.
        truncated_queries: Queries that lost tokens.
        malformed: Lines that this call left out.
        on_change: Called after each change of the counts of rows.
    """

    rows: int = 0
    pairs: int = 0
    truncated: int = 0
    truncated_queries: int = 0
    malformed: int = 0
    on_change: Callable[[Progress], object] = field(default=lambda _: None, repr=False)

    def add(self, rankings: Iterable[Ranking]) -> None:
        """Count the rankings of some requests, each of which becomes a row."""
        for ranking in rankings:
            self.rows += 1
            self.pairs += ranking.num_pairs
            self.truncated += ranking.num_truncated
            self.truncated_queries += ranking.num_truncated_queries
        self.on_change(self)


def rank_lines(
    scorer: Scorer,
    source: Iterable[bytes],
    *,
    top_n: int | None = None,
    threshold: float | None = None,
    return_texts: bool = False,
    strict: bool = False,
    skip: int = 0,
    on_malformed: Callable[[MalformedLineError], object],
    progress: Progress,
) -> Iterator[list[str]]:
    """Rank the requests of a JSONL stream in its order; blank lines are passed over.

    Args:
        scorer: The reranker.
        source: The lines.
        top_n: As in `Scorer.rank`.
        threshold: As in `Scorer.rank`.
        return_texts: Give each passage's text beside its score.
        strict: Raise at the first malformed line instead of leaving it out.
        skip: How many lines at the beginning are done already. They are read and not ranked.
        on_malformed: Called with the error of each line that is left out.
        progress: Kept up to date.

    Yields:
        The rows of some requests at a time, each with its line feed:
        `{"line": 1, "id": ..., "results": [{"index": 0, "id": ..., "score": 0.5}, ...]}`, best first. A
        request or passage has an `id`, and a passage a `title`, where the input gives it one. A passage with
        nothing to read has `"blank": true`.

    Raises:
        MalformedLineError: A line is malformed and `strict`.
        MalformedInputError: No line is a request.
        RerankError: As `Scorer.rank` does.
    """
    first_line, first_error = b"", None

    def leave_out(error: MalformedLineError) -> None:
        if strict:
            raise error
        nonlocal first_error
        first_error = first_error or error
        if error.line > skip:
            progress.malformed += 1
            on_malformed(error)

    def watched() -> Iterator[bytes]:
        nonlocal first_line
        for raw in source:
            first_line = first_line or raw.strip()[:_NUM_BYTES_SHOWN_TO_GUESS]
            yield raw

    for chunk in _chunks(watched(), leave_out):
        if chunk[-1].line <= skip:
            continue
        # All of it is scored even if some rows are done: equal batches give equal scores to the last bit.
        for ranked in _rank_chunk(scorer, chunk, top_n, threshold, leave_out):
            new = [(request, ranking) for request, ranking in ranked if request.line > skip]
            yield [_format(request, ranking, return_texts=return_texts) for request, ranking in new]
            progress.add(ranking for _, ranking in new)
    if not progress.rows and not skip:
        raise no_requests(first_line, first_error)


def _chunks(
    source: Iterable[bytes], leave_out: Callable[[MalformedLineError], object]
) -> Iterator[list[Request]]:
    """Give the requests of a stream, some hundreds of pairs at a time, always cut at the same places."""
    waiting: list[Request] = []
    num_pairs = 0
    for number, raw in enumerate(source, start=1):
        if not raw.strip():
            continue
        try:
            request = parse_request(number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
        except MalformedLineError as error:
            try:
                leave_out(error)
            except MalformedLineError:
                if waiting:  # what came before it is good
                    yield waiting
                raise
            continue
        waiting.append(request)
        num_pairs += len(request.passages)
        if num_pairs >= _NUM_PAIRS_AT_ONCE or len(waiting) >= _NUM_PAIRS_AT_ONCE:
            yield waiting
            waiting, num_pairs = [], 0
    if waiting:
        yield waiting


def _rank_chunk(
    scorer: Scorer,
    chunk: list[Request],
    top_n: int | None,
    threshold: float | None,
    leave_out: Callable[[MalformedLineError], object],
) -> Iterator[list[tuple[Request, Ranking]]]:
    """Rank some requests in one pass; those that the scorer refuses are left out as malformed."""
    while chunk:
        texts = [(request.query, request.texts) for request in chunk]
        try:
            rankings = scorer.rank_many(texts, top_n, threshold)
        except NonFiniteScoreError as error:
            raise _of_line(error, chunk) from None
        except InputError as error:
            if error.index is None:
                raise
            refused, before = chunk[error.index], chunk[: error.index]
            reason = str(error).removeprefix(f"request {error.index}: ")
            try:
                leave_out(MalformedLineError(refused.line, reason))
            except MalformedLineError:  # strict; the requests before it are good
                yield from _rank_chunk(scorer, before, top_n, threshold, leave_out)
                raise
            chunk = before + chunk[error.index + 1 :]
        else:
            yield list(zip(chunk, rankings, strict=True))
            return


def _format(request: Request, ranking: Ranking, *, return_texts: bool) -> str:
    row: dict[str, Any] = {"line": request.line}
    if request.id is not None:
        row["id"] = request.id
    row["results"] = []
    for ranked in ranking:
        passage = request.passages[ranked.index]
        result = {
            "index": ranked.index,
            "id": passage.id,
            "title": passage.title,
            "score": ranked.score,
            "blank": ranked.blank or None,
            "text": passage.text if return_texts else None,
        }
        row["results"].append({name: value for name, value in result.items() if value is not None})
    return json.dumps(row) + "\n"


def _of_line(error: NonFiniteScoreError, chunk: list[Request]) -> NonFiniteScoreError:
    """Name the line and the passage instead of a position among all passages of a chunk."""
    index = error.index or 0
    for request in chunk:
        if index < len(request.passages):
            break
        index -= len(request.passages)
    return NonFiniteScoreError(
        f"line {request.line}: the model's score of passage {index} is not finite", index=index
    )
