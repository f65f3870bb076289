"""JSONL and Parquet files as the source and the destination of a Ray dataset."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from bge_rerank_integrations.errors import missing_extra

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data.block import BlockAccessor, BlockMetadata
    from ray.data.datasource import BlockBasedFileDatasink, Datasource, ReadTask, WriteResult
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

ID_COLUMN: Final = "row_id"
"""Number of a row among all rows of a folder. It is the same in every run over the same files."""

# A row's number has these bits for its position in the file, and the bits above for the file.
_BITS_FOR_ROW: Final = 40


class Written(NamedTuple):
    """What a job has written.

    Attributes:
        num_rows: Number of rows, including those with an error.
        num_errors: Number of rows with an error.
    """

    num_rows: int
    num_errors: int


class FolderSource(Datasource):
    """Reads files in a given order and numbers their rows.

    Args:
        files: The files. One task reads one file.
        read: Yields the tables of a file, each with at most `rows_per_block` rows.
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
        """Return the size of the files."""
        return sum(file.stat().st_size for file in self._files)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:  # noqa: ARG002
        """Return one task for each file."""
        return [
            ReadTask(
                partial(_number_rows, self._read, file, self._rows_per_block, index << _BITS_FOR_ROW),
                BlockMetadata(
                    num_rows=None, size_bytes=file.stat().st_size, input_files=(str(file),), exec_stats=None
                ),
            )
            for index, file in enumerate(self._files)
        ]


def _number_rows(
    read: Callable[[Path, int], Iterator[pa.Table]], file: Path, rows_per_block: int, first: int
) -> Iterator[pa.Table]:
    for table in read(file, rows_per_block):
        numbers = pa.array(range(first, first + len(table)), type=pa.int64())
        yield table.append_column(ID_COLUMN, numbers)
        first += len(table)


def read_jsonl(file: Path, rows_per_block: int, *, folder: Path) -> Iterator[pa.Table]:
    """Yield the lines of a file that are not blank, with the columns `file`, `line` and `raw`.

    Args:
        file: The file.
        rows_per_block: Maximum number of rows of a table.
        folder: The folder that the column `file` is relative to.
    """
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


def read_parquet(file: Path, rows_per_block: int) -> Iterator[pa.Table]:
    """Yield the rows of a file in tables with at most `rows_per_block` rows."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=rows_per_block):
            yield pa.Table.from_batches([batch])


class FolderSink(BlockBasedFileDatasink):
    """Writes the rows of a task to one file, and counts rows and errors over all tasks.

    Args:
        output: The folder to write to.
        file_format: Ending of the names of the files.
        write: Writes a table to a file.
        count_errors: Returns the number of rows with an error.

    Attributes:
        written: The counts. They are set when all rows are written.
    """

    def __init__(
        self,
        output: Path,
        file_format: str,
        write: Callable[[pa.Table, Any], None],
        count_errors: Callable[[pa.Table], int],
    ) -> None:
        super().__init__(str(output), file_format=file_format)
        self.written = Written(0, 0)
        self._write_table = write
        self._count_errors = count_errors

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        """Write the rows of a task, and return their counts."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        super().write(tables, ctx)
        return Written(sum(len(table) for table in tables), sum(map(self._count_errors, tables)))

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        """Write the rows of a block."""
        self._write_table(block.to_arrow(), file)

    def on_write_complete(self, write_result: WriteResult[Any]) -> None:
        """Add the counts of all tasks."""
        super().on_write_complete(write_result)
        counts = write_result.write_returns
        self.written = Written(sum(each[0] for each in counts), sum(each[1] for each in counts))


def jsonl_sink(output: Path) -> FolderSink:
    """Return a sink that writes the column `json` in lines. A row with a true `is_error` is an error."""
    return FolderSink(output, "jsonl", _write_lines, lambda table: sum(table.column("is_error").to_pylist()))


def parquet_sink(output: Path) -> FolderSink:
    """Return a sink that writes all columns. A row with a value in the column `error` is an error."""
    return FolderSink(
        output, "parquet", pq.write_table, lambda table: len(table) - int(table.column("error").null_count)
    )


def _write_lines(table: pa.Table, file: Any) -> None:
    for line in table.column("json").to_pylist():
        file.write(line.encode("utf-8") + b"\n")
