"""Ranking a file of requests: any size in bounded memory, and on from where it stopped after a kill."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from filelock import FileLock, Timeout

from bge_rerank_integrations.cli.jobs.requests import (
    MalformedInputError,
    MalformedLineError,
    Request,
    no_requests,
    parse_request,
)
from bge_rerank_integrations.errors import DatasetError, InputError, NonFiniteScoreError
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


class RankJob:
    """One output file that is finished exactly once, however often its job is killed.

    Rows go to `OUTPUT.partial`, in the input's order, and what the job is goes to `OUTPUT.job.json`; a
    finished job renames the first. Whoever starts the same job again goes on after the last whole row.
    `OUTPUT.lock` keeps a second process out.

    Args:
        output: Where the rows are to be.
        settings: Whatever decides what is written, JSON-safe: another model is another job.
        input_path: The input, whose contents are part of what the job is. None where it cannot be read
            twice; such a job cannot be gone on with, since nobody could tell another input from it.
        overwrite: Begin again, whatever is there. A file that is finished stays until another is.

    Raises:
        DatasetError: The input cannot be read, or is the output; or the output is no plain file.

    Example:
        >>> with RankJob(Path("ranked.jsonl"), {"model": "embedded"}, Path("requests.jsonl")) as job:
        ...     done = job.begin()
        ...     if done is not None:
        ...         job.write(rank_lines(scorer, source, skip=done, ...))
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], input_path: Path | None, *, overwrite: bool = False
    ) -> None:
        output = output.resolve()
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        self._record = output.with_name(output.name + ".job.json")
        if output.exists() and not output.is_file():
            raise DatasetError(f"{output} is not a plain file; leave the output out to write to stdout")
        if input_path is not None and input_path.resolve() in (output, self._partial, self._record):
            raise DatasetError(f"{input_path} is the input; give the output another name")
        self._lock = FileLock(output.with_name(output.name + ".lock"), timeout=0)
        self._can_go_on = input_path is not None
        self._overwrite = overwrite
        self._settings = {**settings, "input_sha256": None if input_path is None else _sha256(input_path)}

    def __enter__(self) -> RankJob:
        """Keep other processes out.

        Raises:
            DatasetError: Another process is writing this file.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            raise DatasetError(f"another process is writing {self._output}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Let others in."""
        self._lock.release()

    def begin(self) -> int | None:
        """Cut off a row that was only half written.

        Returns:
            The number of the last line that is done; None where all is.

        Raises:
            DatasetError: `output` belongs to another job, or is there and nobody knows from what.
        """
        if self._overwrite:
            # This first: what is not finished is never taken for it, whenever this is interrupted.
            self._partial.write_bytes(b"")
        else:
            self._check()
            if self._output.exists() and not self._partial.exists():
                return None
        _write_atomically(self._record, json.dumps(self._settings, indent=1, sort_keys=True) + "\n")
        if not self._partial.exists():
            return 0
        with self._partial.open("r+b") as file:
            file.truncate(_end_of_last_line(file))
            last = _last_line(file)
        if not last:
            return 0
        try:
            return int(json.loads(last)["line"])
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{self._partial} does not end with a row of this job; cut off what is not, or --overwrite"
            ) from error

    def write(self, batches: Iterable[list[str]]) -> None:
        """Append rows as they come, and give the file its name once they are all there.

        Raises:
            MalformedInputError: As the batches do. If no row was written, nothing is left behind.
        """
        try:
            with self._partial.open("a", encoding="utf-8", newline="\n") as file:
                for rows in batches:
                    file.writelines(rows)
                    file.flush()
                os.fsync(file.fileno())
        except MalformedInputError:
            self._discard_if_empty()
            raise
        self._partial.replace(self._output)

    def _discard_if_empty(self) -> None:
        # An older output is still there under --overwrite, and the empty file says that it is not this job's.
        if not self._output.exists() and not self._partial.stat().st_size:
            self._partial.unlink()
            self._record.unlink()

    def _check(self) -> None:
        if not (self._output.exists() or self._partial.exists()):
            return
        if not self._record.exists():
            raise DatasetError(
                f"{self._output} is there already, from something else; use another name or --overwrite"
            )
        if not self._can_go_on:
            raise DatasetError(
                f"{self._output} is there already, and its input was a stream, which cannot be told from "
                "another: put it into a file to be able to go on, or --overwrite"
            )
        try:
            recorded = json.loads(self._record.read_text(encoding="utf-8"))
        except ValueError:
            recorded = None
        if not isinstance(recorded, dict):
            raise DatasetError(f"{self._record} is damaged; use --overwrite to begin again")
        current = json.loads(json.dumps(self._settings))
        differing = sorted(key for key in {*recorded, *current} if recorded.get(key) != current.get(key))
        if differing:
            raise DatasetError(
                f"{self._output} was begun with other settings ({', '.join(differing)}); go on with the "
                "same, use another name, or --overwrite"
            )


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


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _end_of_last_line(file: IO[bytes]) -> int:
    """Return the position after the last line feed."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - (1 << 16), 0)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _last_line(file: IO[bytes]) -> bytes:
    """Return the last line of a file that ends with a line feed."""
    end = max(file.seek(0, os.SEEK_END) - 1, 0)
    start = end
    while start:
        begin = max(start - (1 << 16), 0)
        file.seek(begin)
        position = file.read(start - begin).rfind(b"\n")
        if position >= 0:
            start = begin + position + 1
            break
        start = begin
    file.seek(start)
    return file.read(end - start)
