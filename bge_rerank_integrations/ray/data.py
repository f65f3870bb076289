"""`rerank_dataset` and `score_dataset`: score the rows of a Ray dataset in a pool of actors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Literal, get_args

from bge_rerank_integrations.errors import ConfigError, InputError, RerankError, missing_extra

try:
    import pyarrow as pa
    from ray.data import Dataset
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.ranking import Ranking, check_threshold, check_top_n
from bge_rerank_integrations.ray.actors import ActorOptions, map_with_scorer
from bge_rerank_integrations.ray.rows import rank_rows, score_rows
from bge_rerank_integrations.scorer import Scorer

OnError = Literal["column", "raise"]

ROWS_OF_REQUESTS: Final = 256
"""Default number of rows in a block of requests. A request has dozens of passages."""
_ROWS_OF_PAIRS: Final = 4096


def rerank_dataset(
    ds: Dataset,
    config: ScorerConfig,
    *,
    query_column: str = "query",
    passages_column: str = "passages",
    top_n: int | None = None,
    threshold: float | None = None,
    on_error: OnError = "column",
    actors: ActorOptions | None = None,
) -> Dataset:
    """Rank the passages of each row of a dataset.

    Each actor loads the model once. If an actor dies, Ray starts another one and scores its blocks again, so
    each row has exactly one result. The order of the rows can change, as in any Ray dataset.

    Args:
        ds: Rows with a query and a list of passages.
        config: The settings of the scorers. `normalize` decides the scale of the scores.
        query_column: Name of the column with the query, a string.
        passages_column: Name of the column with the passages, a list of strings.
        top_n: As in `Scorer.rank`, for each row.
        threshold: As in `Scorer.rank`, for each row.
        on_error: What to do with a malformed row, such as one without a query. `column`, the default, puts a
            message into the column `error`. `raise` stops the job.
        actors: Number of actors and their resources; None means one actor.

    Returns:
        A lazy dataset with all columns of `ds` and three more: `indices` (the positions of the passages,
        best first), `scores` (their scores as float64) and `error` (null, or what is wrong with the row). A
        row with an error has null `indices` and `scores`.

    Raises:
        InputError: `top_n` or `threshold` is out of range.
        ConfigError: A setting is invalid, or a column is missing or already exists. If Ray does not know the
            columns yet, the job fails with a `RayTaskError` instead.

    Example:
        >>> ds = ray.data.read_parquet("requests/")
        >>> ranked = rerank_dataset(ds, ScorerConfig(model="embedded"), top_n=10)
        >>> ranked.write_parquet("ranked/")
    """
    check_top_n(top_n)
    check_threshold(threshold, normalize=config.normalize)
    rank = partial(
        _rank_table,
        columns=(query_column, passages_column),
        top_n=top_n,
        threshold=threshold,
        on_error=_check_on_error(on_error),
    )
    _check_known_columns(ds, (query_column, passages_column), RANKING_COLUMNS)
    return map_with_scorer(ds, config, rank, actors or ActorOptions(), rows_per_block=ROWS_OF_REQUESTS)


def score_dataset(
    ds: Dataset,
    config: ScorerConfig,
    *,
    query_column: str = "query",
    passage_column: str = "passage",
    on_error: OnError = "column",
    actors: ActorOptions | None = None,
) -> Dataset:
    """Score each (query, passage) row of a dataset.

    Actors, retries and malformed rows are as in `rerank_dataset`.

    Args:
        ds: Rows with a query and a passage.
        config: The settings of the scorers. `normalize` decides the scale of the scores.
        query_column: Name of the column with the query, a string.
        passage_column: Name of the column with the passage, a string.
        on_error: As in `rerank_dataset`.
        actors: As in `rerank_dataset`.

    Returns:
        A lazy dataset with all columns of `ds` and two more: `score` (float64) and `error` (null, or what is
        wrong with the row). A row with an error has a null `score`.

    Raises:
        ConfigError: A setting is invalid, or a column is missing or already exists. If Ray does not know the
            columns yet, the job fails with a `RayTaskError` instead.

    Example:
        >>> ds = ray.data.from_items([{"query": "what is a panda?", "passage": "The panda is a bear."}])
        >>> [row["score"] for row in score_dataset(ds, ScorerConfig(model="embedded")).take_all()]
        [...]
    """
    score = partial(_score_table, columns=(query_column, passage_column), on_error=_check_on_error(on_error))
    _check_known_columns(ds, (query_column, passage_column), _SCORE_COLUMNS)
    return map_with_scorer(ds, config, score, actors or ActorOptions(), rows_per_block=_ROWS_OF_PAIRS)


RANKING_COLUMNS: Final = {
    "indices": pa.list_(pa.int64()),
    "scores": pa.list_(pa.float64()),
    "error": pa.string(),
}
_SCORE_COLUMNS: Final = {"score": pa.float64(), "error": pa.string()}


def _rank_table(
    scorer: Scorer,
    table: pa.Table,
    *,
    columns: tuple[str, str],
    top_n: int | None,
    threshold: float | None,
    on_error: OnError,
) -> pa.Table:
    rankings = rank_rows(scorer, _rows(table, columns, RANKING_COLUMNS), top_n, threshold)
    errors = _errors(rankings, on_error)
    kept = [ranking if isinstance(ranking, Ranking) else None for ranking in rankings]
    return _with_columns(
        table,
        RANKING_COLUMNS,
        {
            "indices": [None if each is None else [passage.index for passage in each] for each in kept],
            "scores": [None if each is None else [passage.score for passage in each] for each in kept],
            "error": errors,
        },
    )


def _score_table(scorer: Scorer, table: pa.Table, *, columns: tuple[str, str], on_error: OnError) -> pa.Table:
    scores = score_rows(scorer, _rows(table, columns, _SCORE_COLUMNS))
    errors = _errors(scores, on_error)
    kept = [None if isinstance(score, RerankError) else score for score in scores]
    return _with_columns(table, _SCORE_COLUMNS, {"score": kept, "error": errors})


def _rows(
    table: pa.Table, columns: tuple[str, str], added: Mapping[str, pa.DataType]
) -> list[tuple[object, object]]:
    check_columns("the dataset", table.column_names, columns, added)
    first, second = (_values(table.column(name)) for name in columns)
    return list(zip(first, second, strict=True))


def _values(column: pa.ChunkedArray) -> list[object]:
    """Return the values of a column. A string that is not UTF-8 becomes bytes, so its row gets an error."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return [_value(item) for item in scalar.values] if isinstance(scalar, pa.ListScalar) else b""


def _errors(outcomes: Sequence[object], on_error: OnError) -> list[str | None]:
    errors = [str(each) if isinstance(each, RerankError) else None for each in outcomes]
    if on_error == "raise":
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, RerankError):
                raise InputError(f"row {index} of a block: {outcome}", index=index)
    return errors


def _with_columns(
    table: pa.Table, types: Mapping[str, pa.DataType], values: Mapping[str, Sequence[object]]
) -> pa.Table:
    for name, kind in types.items():
        table = table.append_column(name, pa.array(values[name], type=kind))
    return table


def _check_on_error(on_error: OnError) -> OnError:
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error must be one of {list(get_args(OnError))}")
    return on_error


def _check_known_columns(ds: Dataset, needed: Sequence[str], added: Mapping[str, pa.DataType]) -> None:
    """Check the columns before the job runs, if the dataset knows them without reading anything."""
    schema = ds.schema(fetch_if_missing=False)
    if schema is not None:
        check_columns("the dataset", schema.names, needed, added)


def check_columns(source: str, names: Sequence[str], needed: Iterable[str], added: Iterable[str]) -> None:
    """Raise `ConfigError` unless a source has the columns that are needed, and none that will be added.

    Args:
        source: What has the columns, for the message.
        names: Its columns.
        needed: Columns that it must have.
        added: Columns that it must not have.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        raise ConfigError(f"{source} has no column {missing}; its columns are {list(names)}")
    taken = [name for name in added if name in names]
    if taken:
        raise ConfigError(f"{source} already has the column {taken}; rename it first")
