"""Folders of JSONL and Parquet files as the source and the destination of a Ray job."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from bge_rerank_integrations.errors import ConfigError, RerankError, missing_extra

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray.data import DataContext, Dataset
    from ray.data.block import BlockAccessor, BlockMetadata
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.datasource import BlockBasedFileDatasink, Datasource, ReadTask, WriteResult
    from ray.exceptions import RayTaskError
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.ray.data import (
    RANKING_COLUMNS,
    ROWS_OF_REQUESTS,
    ActorOptions,
    check_columns,
    map_with_scorer,
    rerank_dataset,
)
from bge_rerank_integrations.scorer import Scorer

ID_COLUMN: Final = "row_id"
"""Number of a row among all rows of a folder. It is the same in every run over the same files."""

_ADDED_BY_RAY: Final = "Failed to apply UDF transform"

# A row's number has these bits for its position in the file, and the bits above for the file.
_BITS_FOR_ROW: Final = 40


class Line(NamedTuple):
    """One line of a JSONL file that is not blank.

    Attributes:
        file: Path of the file, relative to the folder.
        number: Number of the line, from 1.
        raw: The bytes of the line.
    """

    file: str
    number: int
    raw: bytes


class ResultLine(NamedTuple):
    """One line of the result.

    Attributes:
        json: The line, without a line feed.
        is_error: Whether the line reports a malformed row.
    """

    json: str
    is_error: bool


class Written(NamedTuple):
    """What a job has written.

    Attributes:
        num_rows: Number of rows, including those with an error.
        num_errors: Number of rows with an error.
    """

    num_rows: int
    num_errors: int


def rank_jsonl_folder(
    files: Sequence[Path],
    folder: Path,
    output: Path,
    config: ScorerConfig,
    rank_lines: Callable[[Scorer, list[Line]], list[ResultLine]],
    *,
    actors: ActorOptions,
    checkpoint: Path,
) -> Written:
    """Rank the lines of JSONL files and write JSONL files.

    Args:
        files: The files to read.
        folder: The folder that the paths of the lines are relative to.
        output: The folder to write to.
        config: The settings of the scorers.
        rank_lines: Returns one result for each line. It runs in actors.
        actors: Number of actors and their resources.
        checkpoint: The folder that records which rows are written.
    """
    rows_per_block = actors.rows_per_block or ROWS_OF_REQUESTS
    read = partial(_read_jsonl, folder=folder)
    ds = _read(files, read, rows_per_block, checkpoint)
    ranked = map_with_scorer(
        ds, config, partial(_rank_line_table, rank_lines), actors, rows_per_block=rows_per_block
    )
    return _write(ranked, _JsonlSink(output))


def rank_parquet_folder(
    files: Sequence[Path],
    output: Path,
    config: ScorerConfig,
    *,
    query_column: str,
    passages_column: str,
    top_n: int | None,
    threshold: float | None,
    strict: bool,
    actors: ActorOptions,
    checkpoint: Path,
) -> Written:
    """Rank the rows of Parquet files and write Parquet files, as `rerank_dataset` does.

    Args:
        files: The files to read.
        output: The folder to write to.
        config: The settings of the scorers.
        query_column: As in `rerank_dataset`.
        passages_column: As in `rerank_dataset`.
        top_n: As in `rerank_dataset`.
        threshold: As in `rerank_dataset`.
        strict: Stop at the first malformed row.
        actors: Number of actors and their resources.
        checkpoint: The folder that records which rows are written.

    Raises:
        ConfigError: The columns of two files have types that do not fit together.
    """
    ds = _read(files, _read_parquet, actors.rows_per_block or ROWS_OF_REQUESTS, checkpoint)
    ranked = rerank_dataset(
        ds,
        config,
        query_column=query_column,
        passages_column=passages_column,
        top_n=top_n,
        threshold=threshold,
        on_error="raise" if strict else "column",
        actors=actors,
    )
    return _write(ranked, _ParquetSink(output))


def _read_schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except pa.ArrowInvalid:
        raise ConfigError(f"{file} is not a Parquet file, or it is damaged") from None


def check_parquet_files(files: Sequence[Path], columns: tuple[str, str]) -> None:
    """Check files for `rank_parquet_folder`.

    Args:
        files: The files.
        columns: The columns with the query and the passages.

    Raises:
        ConfigError: A file is not a Parquet file, lacks a column, or has a column that the job adds. Or two
            files have columns of the same name and types that do not fit together.
    """
    schemas = [_read_schema(file) for file in files]
    for file, schema in zip(files, schemas, strict=True):
        check_columns(str(file), schema.names, columns, (ID_COLUMN, *RANKING_COLUMNS))
    try:
        pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(f"the files have columns of different types: {error}") from None


class _FolderSource(Datasource):
    """Reads files in a given order and numbers their rows.

    Args:
        files: The files. One task reads one file.
        read: Yields the tables of a file, each with at most so many rows.
        rows_per_block: Maximum number of rows of a table.
    """

    def __init__(
        self, files: Sequence[Path], read: Callable[[Path, int], Iterator[pa.Table]], rows_per_block: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files = list(files)
        self._read = read
        self._rows_per_block = rows_per_block

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(file.stat().st_size for file in self._files)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:  # noqa: ARG002
        return [
            ReadTask(
                partial(_number_rows, self._read, file, self._rows_per_block, index << _BITS_FOR_ROW),
                BlockMetadata(
                    num_rows=None, size_bytes=file.stat().st_size, input_files=(str(file),), exec_stats=None
                ),
            )
            for index, file in enumerate(self._files)
        ]


class _CountingSink(BlockBasedFileDatasink, ABC):
    """Writes the rows of a task to one file, and counts rows and errors over all tasks."""

    written = Written(0, 0)

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        super().write(tables, ctx)
        return Written(sum(len(table) for table in tables), sum(map(self.num_errors, tables)))

    def on_write_complete(self, write_result: WriteResult[Any]) -> None:
        super().on_write_complete(write_result)
        counts = write_result.write_returns
        self.written = Written(sum(each[0] for each in counts), sum(each[1] for each in counts))

    @abstractmethod
    def num_errors(self, table: pa.Table) -> int:
        """Return the number of rows with an error."""


class _JsonlSink(_CountingSink):
    def __init__(self, output: Path) -> None:
        super().__init__(str(output), file_format="jsonl")

    def num_errors(self, table: pa.Table) -> int:
        return sum(table.column("is_error").to_pylist())

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        for line in block.to_arrow().column("json").to_pylist():
            file.write(line.encode("utf-8") + b"\n")


class _ParquetSink(_CountingSink):
    def __init__(self, output: Path) -> None:
        super().__init__(str(output), file_format="parquet")

    def num_errors(self, table: pa.Table) -> int:
        return len(table) - int(table.column("error").null_count)

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        pq.write_table(block.to_arrow(), file)


def _read(
    files: Sequence[Path],
    read: Callable[[Path, int], Iterator[pa.Table]],
    rows_per_block: int,
    checkpoint: Path,
) -> Dataset:
    context = DataContext.get_current()
    before = context.checkpoint_config
    # The caller deletes the checkpoint. If Ray did, a job that is killed just after that would look like one
    # that has not begun.
    context.checkpoint_config = CheckpointConfig(
        ID_COLUMN, str(checkpoint), delete_checkpoint_on_success=False
    )
    try:
        ds: Dataset = ray.data.read_datasource(_FolderSource(files, read, rows_per_block))
    finally:
        context.checkpoint_config = before
    ds.context.raise_original_map_exception = True
    return ds


def _write(ds: Dataset, sink: _CountingSink) -> Written:
    try:
        ds.write_datasink(sink)
    except RayTaskError as error:
        if isinstance(error.cause, RerankError):
            # Ray adds how often it has tried, and how to change that.
            message = str(error.cause).partition(_ADDED_BY_RAY)[0].rstrip()
            error.cause.args = (message, *error.cause.args[1:])
            raise error.cause from None
        if isinstance(error.cause, pa.ArrowInvalid) and isinstance(sink, _ParquetSink):
            # Such as an integer beyond 2**53 in one file, where another file has floats. Arrow's message
            # contains the value.
            raise ConfigError(
                "the rows of the files do not fit into one table; give each column the same type in all files"
            ) from None
        raise
    return sink.written


def _number_rows(
    read: Callable[[Path, int], Iterator[pa.Table]], file: Path, rows_per_block: int, first: int
) -> Iterator[pa.Table]:
    for table in read(file, rows_per_block):
        numbers = pa.array(range(first, first + len(table)), type=pa.int64())
        yield table.append_column(ID_COLUMN, numbers)
        first += len(table)


def _read_jsonl(file: Path, rows_per_block: int, *, folder: Path) -> Iterator[pa.Table]:
    name = file.relative_to(folder).as_posix()
    with file.open("rb") as stream:
        lines = _numbered_lines(stream)
        while part := list(islice(lines, rows_per_block)):
            yield pa.table(
                {
                    "file": pa.array([name] * len(part), type=pa.string()),
                    "line": pa.array([number for number, _ in part], type=pa.int64()),
                    "raw": pa.array([raw for _, raw in part], type=pa.large_binary()),
                }
            )


def _numbered_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes of each line that is not blank, without a byte order mark."""
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if line.strip():
            yield number, line


def _read_parquet(file: Path, rows_per_block: int) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=rows_per_block):
            yield pa.Table.from_batches([batch])


def _rank_line_table(
    rank_lines: Callable[[Scorer, list[Line]], list[ResultLine]], scorer: Scorer, table: pa.Table
) -> pa.Table:
    columns = [table.column(name).to_pylist() for name in ("file", "line", "raw")]
    results = rank_lines(scorer, [Line(*values) for values in zip(*columns, strict=True)])
    return pa.table(
        {
            ID_COLUMN: table.column(ID_COLUMN),
            "json": pa.array([result.json for result in results], type=pa.large_string()),
            "is_error": pa.array([result.is_error for result in results], type=pa.bool_()),
        }
    )
