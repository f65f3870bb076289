"""Reading and writing the files of an evaluation: BEIR folders and TREC runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.errors import DatasetError

Run = dict[str, dict[str, float]]
"""Maps a query id to its passages: passage id to score."""

# Larger grades mean nothing, and pytrec_eval reserves memory for each grade up to the largest.
_MAX_GRADE: Final = 1000
_GZIP: Final = b"\x1f\x8b"
_UNUSABLE: Final = re.compile("[\0\ud800-\udfff]").search


@dataclass(frozen=True, kw_only=True)
class BeirDataset:
    """The contents of a BEIR folder.

    Attributes:
        corpus: Maps a passage id to its title, if any, a space and its text.
        queries: Maps a query id to its text.
        qrels: Maps a query id to its judgements: passage id to relevance grade.
        num_repeated: Number of judgements that repeat the query and passage of an earlier one. The highest
            grade counts.
        num_conflicting: Number of repeated judgements whose grade differs from the earlier one.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    num_repeated: int = 0
    num_conflicting: int = 0

    def judged_queries(self) -> dict[str, str]:
        """Return the queries with at least one relevant passage. Only these queries are evaluated."""
        return {
            query_id: text
            for query_id, text in self.queries.items()
            if any(relevance > 0 for relevance in self.qrels.get(query_id, {}).values())
        }

    def num_unknown_passages(self) -> int:
        """Return the number of relevant judgements, for evaluated queries, of passages not in the corpus."""
        return sum(passage_id not in self.corpus for passage_id in self._relevant())

    def num_relevant(self) -> int:
        """Return the number of relevant judgements for evaluated queries."""
        return sum(1 for _ in self._relevant())

    def _relevant(self) -> Iterator[str]:
        """Yield the passage id of each relevant judgement for an evaluated query."""
        for query_id in self.judged_queries():
            for passage_id, relevance in self.qrels[query_id].items():
                if relevance > 0:
                    yield passage_id


def join_title(title: str | None, text: str) -> str:
    """Return the text that the model scores for a passage: its title, if any, a space and its text."""
    return f"{title} {text}".strip() if title else text


def read_corpus(folder: Path) -> dict[str, str]:
    """Read `corpus.jsonl`. Each line has an `_id`, a `text` and an optional `title`.

    Raises:
        DatasetError: The file is missing or malformed. The message names the line.
    """
    corpus: dict[str, str] = {}
    for number, row in _rows(folder / "corpus.jsonl"):
        title, text = row.get("title") or "", row.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise DatasetError(f"{folder / 'corpus.jsonl'}, line {number}: title and text must be strings")
        corpus[row["_id"]] = join_title(title, text)
    return corpus


def read_queries(folder: Path) -> dict[str, str]:
    """Read `queries.jsonl`. Each line has an `_id` and a `text`.

    Raises:
        DatasetError: The file is missing or malformed. The message names the line.
    """
    queries: dict[str, str] = {}
    for number, row in _rows(folder / "queries.jsonl"):
        if not isinstance(row.get("text"), str):
            raise DatasetError(f"{folder / 'queries.jsonl'}, line {number}: text must be a string")
        queries[row["_id"]] = row["text"]
    return queries


def read_beir(folder: Path, split: str = "test", *, strict: bool = False) -> BeirDataset:
    """Read a BEIR folder: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.

    Args:
        folder: The BEIR folder.
        split: Name of the split whose judgements are read.
        strict: Raise `DatasetError` if a passage is judged twice for a query.

    Raises:
        DatasetError: A file is missing or malformed, no query of the split has a relevant passage, or the
            corpus contains none of the relevant passages.
    """
    qrels: dict[str, dict[str, int]] = {}
    num_repeated = num_conflicting = 0
    path = folder / "qrels" / f"{split}.tsv"
    for number, query_id, passage_id, relevance in _judgements(path):
        judged = qrels.setdefault(query_id, {})
        earlier = judged.get(passage_id)
        if earlier is not None:
            if strict:
                raise DatasetError(f"{path}, line {number}: passage judged twice for this query")
            num_repeated += 1
            num_conflicting += relevance != earlier
        judged[passage_id] = relevance if earlier is None else max(relevance, earlier)
    dataset = BeirDataset(
        corpus=read_corpus(folder),
        queries=read_queries(folder),
        qrels=qrels,
        num_repeated=num_repeated,
        num_conflicting=num_conflicting,
    )
    if not dataset.judged_queries():
        raise DatasetError(f"{path} has no relevant passage for any query of {folder / 'queries.jsonl'}")
    if dataset.num_unknown_passages() == dataset.num_relevant():
        raise DatasetError(
            f"none of the relevant passages in {path} is in {folder / 'corpus.jsonl'}; are its ids from "
            "another data set?"
        )
    return dataset


def read_run(path: Path) -> Run:
    """Read a TREC run. Each line is `query-id Q0 passage-id rank score tag`, and scores are finite.

    Passages are sorted by score. Passages with equal scores keep the order of the file.

    Raises:
        DatasetError: The file is missing or malformed, or lists a passage twice for a query. The message
            names the line.
    """
    run: Run = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            query_id, _, passage_id, _, score, _ = line.split()
            value = float(score)
            if not math.isfinite(value):
                raise ValueError(score)
        except ValueError as error:
            raise DatasetError(
                f"{path}, line {number}: not `query-id Q0 passage-id rank score tag`"
            ) from error
        _check_ids(path, number, query_id, passage_id)
        if passage_id in run.setdefault(query_id, {}):
            raise DatasetError(f"{path}, line {number}: passage listed twice for this query")
        run[query_id][passage_id] = value
    return {query_id: sorted_run(scores) for query_id, scores in run.items()}


def format_run(run: Mapping[str, Mapping[str, float]], tag: str) -> Iterator[str]:
    """Yield the lines of a TREC run, with the passages of each query best first.

    Raises:
        DatasetError: An id is empty or contains white space, which separates the fields of a line.
    """
    for query_id, scores in run.items():
        for rank, (passage_id, score) in enumerate(sorted_run(scores).items(), start=1):
            for item in (query_id, passage_id):
                if item.split() != [item]:
                    raise DatasetError(f"an id of a TREC run is empty or has white space: {item!r}")
            yield f"{query_id} Q0 {passage_id} {rank} {score!r} {tag}\n"


def sorted_run(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the passages of one query best first. Passages with equal scores keep their order."""
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield the line number, query id, passage id and relevance grade of each judgement."""
    may_be_header = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        fields = line.rstrip("\n").split("\t")
        is_header = may_be_header and fields[-1] == "score"
        may_be_header = False
        if is_header:
            continue
        try:
            query_id, passage_id, text = fields
            grade = int(text)
        except ValueError as error:
            raise DatasetError(
                f"{path}, line {number}: not `query-id TAB corpus-id TAB whole number`"
            ) from error
        if abs(grade) > _MAX_GRADE:
            raise DatasetError(f"{path}, line {number}: the grade is not from {-_MAX_GRADE} to {_MAX_GRADE}")
        _check_ids(path, number, query_id, passage_id)
        yield number, query_id, passage_id, grade


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    seen: set[str] = set()
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}, line {number}: not valid JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str):
            raise DatasetError(f"{path}, line {number}: not an object with a string `_id`")
        _check_ids(path, number, row["_id"])
        if row["_id"] in seen:
            raise DatasetError(f"{path}, line {number}: `_id` already used on an earlier line")
        seen.add(row["_id"])
        yield number, row


def _check_ids(path: Path, number: int, *ids: str) -> None:
    """Raise `DatasetError` if an id has a character that the libraries for evaluation cannot handle.

    pytrec_eval reads an id up to a NUL character. A lone surrogate cannot be encoded in UTF-8.
    """
    for each in ids:
        if _UNUSABLE(each):
            raise DatasetError(f"{path}, line {number}: an id contains NUL or a lone surrogate")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(_why_not_text(path)) from error


def _why_not_text(path: Path) -> str:
    """Return a message for a file that is not UTF-8. It names the first such line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(_GZIP):
                return f"{path} is compressed with gzip; unpack it with `gunzip --keep`"
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"{path}, line {number}: not UTF-8"
    return f"{path} is not UTF-8"
