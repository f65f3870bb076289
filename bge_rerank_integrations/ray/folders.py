"""Jobs on Ray that rank the rows of a folder of files and write a folder of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from bge_rerank_integrations.errors import ConfigError, RerankError, missing_extra

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray.data import DataContext, Dataset
    from ray.data.checkpoint import CheckpointConfig
    from ray.exceptions import RayTaskError
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.ray.actors import ActorOptions, map_with_scorer
from bge_rerank_integrations.ray.data import (
    RANKING_COLUMNS,
    ROWS_OF_REQUESTS,
    check_columns,
    rerank_dataset,
)
from bge_rerank_integrations.ray.files import (
    ID_COLUMN,
    FolderSink,
    FolderSource,
    Written,
    jsonl_sink,
    parquet_sink,
    read_jsonl,
    read_parquet,
)
from bge_rerank_integrations.scorer import Scorer

_ADDED_BY_RAY: Final = "Failed to apply UDF transform"


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
    read = partial(read_jsonl, folder=folder)
    ds = _read(files, read, rows_per_block, checkpoint)
    ranked = map_with_scorer(
        ds, config, partial(_rank_line_table, rank_lines), actors, rows_per_block=rows_per_block
    )
    return _write(ranked, jsonl_sink(output))


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
    ds = _read(files, read_parquet, actors.rows_per_block or ROWS_OF_REQUESTS, checkpoint)
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
    try:
        return _write(ranked, parquet_sink(output))
    except RayTaskError as error:
        if not isinstance(error.cause, pa.ArrowInvalid):
            raise
        # Such as an integer beyond 2**53 in one file, where another file has floats. Arrow's message
        # contains the value.
        raise ConfigError(
            "the rows of the files do not fit into one table; give each column the same type in all files"
        ) from None


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


def _read(
    files: Sequence[Path],
    read: Callable[[Path, int], Iterator[pa.Table]],
    rows_per_block: int,
    checkpoint: Path,
) -> Dataset:
    context = DataContext.get_current()
    before = context.checkpoint_config
    # The caller deletes the checkpoint. If Ray deleted it, a job that is killed right afterwards would look
    # as if it had never begun.
    context.checkpoint_config = CheckpointConfig(
        ID_COLUMN, str(checkpoint), delete_checkpoint_on_success=False
    )
    try:
        ds: Dataset = ray.data.read_datasource(FolderSource(files, read, rows_per_block))
    finally:
        context.checkpoint_config = before
    ds.context.raise_original_map_exception = True
    return ds


def _write(ds: Dataset, sink: FolderSink) -> Written:
    try:
        ds.write_datasink(sink)
    except RayTaskError as error:
        if isinstance(error.cause, RerankError):
            error.cause.args = (_own_message(error.cause), *error.cause.args[1:])
            raise error.cause from None
        if isinstance(error.cause, OSError):
            raise _without_addition(error.cause) from None
        raise
    return sink.written


def _own_message(error: Exception) -> str:
    """Return a message without what Ray adds: how often it has tried, and how to change that."""
    return str(error).partition(_ADDED_BY_RAY)[0].rstrip()


def _without_addition(error: OSError) -> OSError:
    """Return the error of a task, such as that of a full disk. Ray may have made its advice the file name.

    The exception of Ray is an `OSError` too, but has neither a reason nor a file.
    """
    reason = error.strerror or _own_message(error)
    name = None if str(error.filename).startswith(_ADDED_BY_RAY) else error.filename
    return OSError(error.errno, reason, name)


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
