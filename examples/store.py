"""Keeps chunks of documents in a LanceDB table on disk, with a full-text index and, if wanted, vectors.

Both apps use LanceDB through this file and not through their framework's integration. As of this writing,
langchain-lancedb searches vectors only, and llama-index-vector-stores-lancedb cannot hold text without
vectors and builds the whole full-text index again in each process. Neither knows which files have changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from tqdm import tqdm

from bge_rerank_integrations.errors import missing_extra
from examples.folder import FolderError, SkippedFileError, SourceFile

try:
    import lancedb
    import pyarrow as pa
    from lancedb.expr import col, lit
    from lancedb.index import FTS
    from lancedb.query import MatchQuery
    from lancedb.rerankers import RRFReranker
except ImportError as error:
    raise missing_extra("examples", "lancedb") from error

_NUM_CHUNKS_A_COMMIT = 2_000
_MAX_HEADING_LENGTH = 300  # characters; some pages have all their text in one heading
_COLUMNS = [("id", pa.string()), ("file", pa.string()), ("stamp", pa.string()), ("position", pa.int32())]
_COLUMNS += [("page", pa.int32()), ("heading", pa.string()), ("text", pa.string()), ("words", pa.string())]

# Chinese and Japanese do not put spaces between words. Each pair of neighbouring characters counts as one, as
# in Lucene's analyzer for them. LanceDB's own `icu` tokenizer knows words, but then 熊猫 misses 大熊猫.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")


class Embedder(Protocol):
    """Converts texts to vectors."""

    dimension: int

    def embed_passages(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector of length 1 for each text."""

    def embed_question(self, text: str) -> list[float]:
        """Return the vector of a question, with length 1."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, from the splitter of an app.

    Attributes:
        text: The piece.
        heading: The headings above it, outermost first; empty if there are none.
        page: Its page in a PDF, from 1.
    """

    text: str
    heading: str = ""
    page: int | None = None


@dataclass(frozen=True)
class FoundChunk:
    """A chunk in the result of a search.

    Attributes:
        id: Names it within the index.
        file: Name of its file.
        page: Its page in a PDF, from 1.
        heading: The headings above it.
        text: The piece itself.
        score: BM25, or, with vectors, the sum of reciprocal ranks.
    """

    id: str
    file: str
    page: int | None
    heading: str
    text: str
    score: float


@dataclass
class Update:
    """The result of one update of the index.

    Attributes:
        num_indexed: Files that were new or had changed.
        num_removed: Files that left the index because they are gone.
        skipped: Files that could not be read, and why. They are not in the index.
    """

    num_indexed: int = 0
    num_removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


class ChunkStore:
    """Chunks of documents on disk, found by their words and, with an embedder, by their meaning.

    Any number of processes may search while one updates. An update that is killed leaves an index that
    works; the next one does what is missing.

    Args:
        folder: Where the table is kept; made if it is not there. One folder belongs to one set of documents,
            one way to split them and one embedder.
        embedder: Adds vectors.

    Raises:
        FolderError: The folder cannot be made, or holds a damaged table.
    """

    def __init__(self, folder: Path, embedder: Embedder | None = None) -> None:
        self.folder = folder
        self._embedder = embedder
        vector = [] if embedder is None else [("vector", pa.list_(pa.float32(), embedder.dimension))]
        self._schema = pa.schema(_COLUMNS + vector)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / "update.lock")
            with self._lock:
                # Changes by another process become visible immediately.
                database = lancedb.connect(folder, read_consistency_interval=timedelta(0))
                self._table = database.create_table("chunks", schema=self._schema, exist_ok=True)
                if not self._table.list_indices():
                    # `split_words` has split the text. Stop words stay, since a question may consist of them.
                    config = FTS(base_tokenizer="whitespace", remove_stop_words=False)
                    self._table.create_index("words", config=config)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise FolderError(
                f"no index can be kept in {folder}; if it is damaged, delete it: {reason}"
            ) from error

    def __len__(self) -> int:
        """Return the number of chunks."""
        return int(self._table.count_rows())

    def update(
        self,
        files: Sequence[SourceFile],
        split: Callable[[SourceFile], Iterable[Chunk]],
        *,
        progress: bool = False,
    ) -> Update:
        """Update the index to these files. Only files that have changed are read.

        Args:
            files: All files that the index is to hold.
            split: Reads and splits one; may raise `SkippedFileError`.
            progress: Show a progress bar on stderr, if that is a terminal.
        """
        with self._lock:
            known = self._stamps()
            changed = [file for file in files if known.get(file.name) != file.stamp]
            gone = sorted(known.keys() - {file.name for file in files})
            update = Update(num_removed=len(gone))
            names: list[str] = []
            rows: list[dict[str, Any]] = []
            hidden = None if progress else True  # with None, tqdm hides the bar if stderr is not a terminal
            for file in tqdm(changed, desc="Indexing", unit="file", leave=False, disable=hidden):
                try:
                    chunks = [chunk for chunk in split(file) if chunk.text.strip()]
                    rows.extend(_make_row(file, *item) for item in enumerate(chunks))
                    update.num_indexed += 1
                except SkippedFileError as error:
                    update.skipped.append((file.name, str(error)))
                names.append(file.name)
                if len(rows) >= _NUM_CHUNKS_A_COMMIT:
                    self._replace(names, rows)
                    names, rows = [], []
            self._replace(names + gone, rows)
            if changed or gone or self._num_unindexed():
                # This adds the new chunks to the full-text index. Before that, a slower scan finds them.
                self._table.optimize(cleanup_older_than=timedelta(hours=1))
        return update

    def search(self, question: str, num_results: int) -> list[FoundChunk]:
        """Return the chunks that fit a question, best first.

        Args:
            question: Any text; there is no query language in it.
            num_results: How many, at most.
        """
        question = _valid_unicode(question)
        words = MatchQuery(split_words(question), "words")  # type: ignore[call-arg]  # they have defaults
        columns = ["id", "file", "page", "heading", "text"]
        if self._embedder is None:
            score = "_score"
            query = self._table.search(words, query_type="fts").select([*columns, score])
        else:
            score = "_relevance_score"
            hybrid = self._table.search(query_type="hybrid").text(words)
            vector = self._embedder.embed_question(question)
            query = hybrid.vector(vector).rerank(RRFReranker())
        rows = query.limit(num_results).to_list()
        return [FoundChunk(score=row[score], **{name: row[name] for name in columns}) for row in rows]

    def chunks(self) -> list[FoundChunk]:
        """Return all chunks, with a score of 0."""
        columns = ["id", "file", "page", "heading", "text"]
        rows = self._table.search().select(columns).limit(len(self)).to_list()
        return [FoundChunk(score=0.0, **row) for row in rows]

    def _stamps(self) -> dict[str, str]:
        first = self._table.search().where("position = 0").select(["file", "stamp"])
        return {row["file"]: row["stamp"] for row in first.limit(len(self)).to_list()}

    def _num_unindexed(self) -> int:
        """Return the number of chunks that are missing in the full-text index after a killed update."""
        statistics = self._table.index_stats("words_idx")
        return 0 if statistics is None else statistics.num_unindexed_rows

    def _replace(self, names: list[str], rows: list[dict[str, Any]]) -> None:
        """Replace all rows of some files by other rows, in one commit."""
        if not names:
            return
        if self._embedder is not None:
            texts = [f"{row['heading']}\n{row['text']}".strip() for row in rows]
            for row, vector in zip(rows, self._embedder.embed_passages(texts), strict=True):
                row["vector"] = vector
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge = merge.when_not_matched_by_source_delete(col("file").isin([lit(name) for name in names]))
        merge.execute(pa.Table.from_pylist(rows, schema=self._schema))


def split_words(text: str) -> str:
    """Return the words of a text, separated by spaces. Chinese, Japanese and Korean give pairs of characters.

    Example:
        >>> split_words("os.path_join: 大熊猫")
        'os path join 大熊 熊猫'
    """
    words: list[str] = []
    for word in _WORD.findall(text):
        if re.match(f"[{_CJK}]", word):
            words.extend(word[start : start + 2] for start in range(max(1, len(word) - 1)))
        else:
            words.append(word)
    return " ".join(words)


def _make_row(file: SourceFile, position: int, chunk: Chunk) -> dict[str, Any]:
    heading, text = _valid_unicode(chunk.heading)[:_MAX_HEADING_LENGTH], _valid_unicode(chunk.text)
    return {
        "id": f"{file.name}#{position}",
        "file": file.name,
        "stamp": file.stamp,
        "position": position,
        "page": chunk.page,
        "heading": heading,
        "text": text,
        "words": split_words(f"{heading} {text}"),
    }


def _valid_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON and broken PDF files may contain."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
