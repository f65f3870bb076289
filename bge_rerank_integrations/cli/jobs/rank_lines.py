"""Ranking the requests of a JSONL stream of any size in bounded memory."""

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
from bge_rerank_integrations.validation import reason_of

# This many pairs fill batches well. If a job is killed, at most this many pairs are scored again.
_NUM_PAIRS_AT_ONCE: Final = 512
# This many bytes of the first line are enough to guess the format of an input without requests.
_NUM_BYTES_SHOWN_TO_GUESS: Final = 1024


@dataclass
class Progress:
    """Counts of what a job has done so far.

    Attributes:
        num_rows: Number of rows written by this call.
        num_pairs: Number of pairs scored by this call.
        num_truncated: Number of these pairs whose passage lost tokens because it was too long.
        num_truncated_queries: Number of queries that lost tokens because they were too long.
        num_malformed: Number of malformed lines that this call skipped.
        on_change: Called with this object each time rows were added.
    """

    num_rows: int = 0
    num_pairs: int = 0
    num_truncated: int = 0
    num_truncated_queries: int = 0
    num_malformed: int = 0
    on_change: Callable[[Progress], object] = field(default=lambda _: None, repr=False)

    def add(self, rankings: Iterable[Ranking]) -> None:
        """Add the rankings of some requests to the counts. Each ranking becomes one row."""
        for ranking in rankings:
            self.num_rows += 1
            self.num_pairs += ranking.num_pairs
            self.num_truncated += ranking.num_truncated
            self.num_truncated_queries += ranking.num_truncated_queries
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
    """Rank the requests of a JSONL stream, in the order of the stream. Blank lines are ignored.

    Args:
        scorer: The reranker.
        source: The lines of the stream.
        top_n: As in `Scorer.rank`.
        threshold: As in `Scorer.rank`.
        return_texts: Include each passage's text in its result.
        strict: Raise at the first malformed line instead of skipping it.
        skip: Number of lines at the beginning that an earlier call has already ranked. They are read again
            but produce no rows.
        on_malformed: Called with the error of each malformed line that is skipped.
        progress: Counts that are updated after each list of rows.

    Yields:
        A list of rows for some consecutive requests. A row is one line of JSON that ends with a line feed:
        `{"line": 1, "id": ..., "results": [{"index": 0, "id": ..., "score": 0.5}, ...]}`, best passage
        first. A request or passage has an `id`, and a passage has a `title`, if the input contains one. A
        blank passage has `"blank": true`.

    Raises:
        MalformedLineError: A line is malformed and `strict` is true.
        MalformedInputError: No line is a request.
        RerankError: `Scorer.rank` raises it.
    """
    first_line, first_error = b"", None

    def leave_out(error: MalformedLineError) -> None:
        if strict:
            raise error
        nonlocal first_error
        first_error = first_error or error
        if error.line > skip:
            progress.num_malformed += 1
            on_malformed(error)

    def watched() -> Iterator[bytes]:
        nonlocal first_line
        for raw in source:
            first_line = first_line or raw.strip()[:_NUM_BYTES_SHOWN_TO_GUESS]
            yield raw

    for chunk in _chunks(watched(), leave_out):
        if chunk[-1].line <= skip:
            continue
        # The whole chunk is scored again even if some of its rows are already written: only the same batches
        # give bit-identical scores.
        for ranked in _rank_chunk(scorer, chunk, top_n, threshold, leave_out):
            new = [(request, ranking) for request, ranking in ranked if request.line > skip]
            yield [
                json.dumps(format_row(request, ranking, return_texts=return_texts)) + "\n"
                for request, ranking in new
            ]
            progress.add(ranking for _, ranking in new)
    if not progress.num_rows and not skip:
        raise no_requests(first_line, first_error)


def _chunks(
    source: Iterable[bytes], leave_out: Callable[[MalformedLineError], object]
) -> Iterator[list[Request]]:
    """Yield the requests of a stream in chunks of a few hundred pairs, with the same chunks in every run."""
    waiting: list[Request] = []
    num_pairs = 0
    for number, raw in enumerate(source, start=1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if not line.strip():
            continue
        try:
            request = parse_request(number, line)
        except MalformedLineError as error:
            try:
                leave_out(error)
            except MalformedLineError:
                if waiting:  # strict mode still returns the requests before the malformed line
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
    """Rank the requests of a chunk together. A request that the scorer rejects is skipped as malformed."""
    while chunk:
        texts = [(request.query, request.texts) for request in chunk]
        try:
            rankings = scorer.rank_many(texts, top_n, threshold)
        except NonFiniteScoreError as error:
            raise _error_of_line(error, chunk) from None
        except InputError as error:
            if error.index is None:
                raise
            refused, before = chunk[error.index], chunk[: error.index]
            try:
                leave_out(MalformedLineError(refused.line, reason_of(error)))
            except MalformedLineError:  # strict mode still returns the requests before the rejected one
                yield from _rank_chunk(scorer, before, top_n, threshold, leave_out)
                raise
            chunk = before + chunk[error.index + 1 :]
        else:
            yield list(zip(chunk, rankings, strict=True))
            return


def format_row(request: Request, ranking: Ranking, *, return_texts: bool) -> dict[str, Any]:
    """Return the row of a ranked request, as `rank_lines` describes it."""
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
    return row


def _error_of_line(error: NonFiniteScoreError, chunk: list[Request]) -> NonFiniteScoreError:
    """Return an error that names the line and the passage instead of a position within the chunk."""
    index = error.index or 0
    for request in chunk:
        if index < len(request.passages):
            break
        index -= len(request.passages)
    return NonFiniteScoreError(
        f"line {request.line}: the model's score of passage {index} is not finite", index=index
    )
