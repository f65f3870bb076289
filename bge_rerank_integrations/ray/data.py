"""`rerank_dataset` and `score_dataset`: score the rows of a Ray dataset in a pool of actors."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

from bge_rerank_integrations.errors import (
    ConfigError,
    DeviceLostError,
    InputError,
    RerankError,
    WorkerDiedError,
    missing_extra,
)

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, Dataset
    from ray.data.block import BlockAccessor
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.ranking import Ranking, check_threshold, check_top_n
from bge_rerank_integrations.ray.rows import rank_rows, score_rows
from bge_rerank_integrations.scorer import Scorer

logger = logging.getLogger("bge_rerank_integrations.ray")

OnError = Literal["column", "raise"]
ScoreTable = Callable[[Scorer, pa.Table], pa.Table]
"""Returns a table with one row for each row of the given table."""

ROWS_OF_REQUESTS: Final = 256
"""Default number of rows in a block of requests. A request has dozens of passages."""
_ROWS_OF_PAIRS: Final = 4096
# CPUs that Ray's own tasks need so that a job makes progress: one for the tasks that read, divide and write
# blocks, and with checkpoints another one for the actor that leaves out the rows that are done.
_CPUS_FOR_TASKS: Final = 1
_CPUS_FOR_CHECKPOINTS: Final = 1
_STATUS_OF_LOST_ACTOR: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """How many actors score a dataset, and what each of them reserves.

    Attributes:
        num_actors: Number of actors. Each of them loads the model once.
        num_cpus: Logical CPUs that each actor reserves; None means 1, or less if the actors would otherwise
            leave no CPU for reading and writing. An actor uses one thread for each whole CPU that it
            reserves, and at least one, unless the config sets `num_threads`.
        num_gpus: GPUs that each actor reserves. 1 reserves one GPU for each actor.
        rows_per_block: Maximum number of rows that an actor scores in one call; None means 256 for
            `rerank_dataset` and 4,096 for `score_dataset`. One output file contains one block. A
            checkpoint saves whole blocks, and a block is scored again if its actor dies.
        concurrent_calls: Number of blocks that an actor scores at the same time. With 2, one block is
            tokenized while the model computes the other.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> ActorOptions(num_actors=8, num_gpus=1).num_actors
        8
    """

    num_actors: int = 1
    num_cpus: float | None = None
    num_gpus: float = 0
    rows_per_block: int | None = None
    concurrent_calls: int = 2

    def __post_init__(self) -> None:
        counts: Mapping[str, object] = {
            "num_actors": self.num_actors,
            "concurrent_calls": self.concurrent_calls,
            "rows_per_block": 1 if self.rows_per_block is None else self.rows_per_block,
        }
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(f"{name} must be an integer of at least 1")
        amounts: Mapping[str, object] = {
            "num_cpus": 0 if self.num_cpus is None else self.num_cpus,
            "num_gpus": self.num_gpus,
        }
        for name, amount in amounts.items():
            is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
            if not is_number or not 0 <= amount < math.inf:  # type: ignore[operator]
                raise ConfigError(f"{name} must be a number of at least 0")


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
        ConfigError: A setting is invalid, or a column is missing or already exists.

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
        ConfigError: A setting is invalid, or a column is missing or already exists.

    Example:
        >>> ds = ray.data.from_items([{"query": "what is a panda?", "passage": "The panda is a bear."}])
        >>> [row["score"] for row in score_dataset(ds, ScorerConfig(model="embedded")).take_all()]
        [...]
    """
    score = partial(_score_table, columns=(query_column, passage_column), on_error=_check_on_error(on_error))
    _check_known_columns(ds, (query_column, passage_column), _SCORE_COLUMNS)
    return map_with_scorer(ds, config, score, actors or ActorOptions(), rows_per_block=_ROWS_OF_PAIRS)


def map_with_scorer(
    ds: Dataset, config: ScorerConfig, score: ScoreTable, actors: ActorOptions, *, rows_per_block: int
) -> Dataset:
    """Apply a function that needs a scorer to blocks of a dataset.

    Args:
        ds: The dataset.
        config: The settings of the scorers.
        score: The function. It runs in actors, so it must be possible to pickle it.
        actors: Number of actors and their resources.
        rows_per_block: Maximum number of rows of a block, if `actors` does not say so.
    """
    rows_per_block = actors.rows_per_block or rows_per_block
    config = _with_absolute_paths(config)
    _warn_without_gpus(actors)
    num_cpus = _num_cpus(actors, has_checkpoints=ds.context.checkpoint_config is not None)
    if config.num_threads is None:
        # Ray limits OpenMP to the whole CPUs that an actor reserves, and to 1 for a fraction of a CPU.
        config = dataclasses.replace(config, num_threads=max(int(actors.num_cpus or 1), 1))
    return ds.repartition(target_num_rows_per_block=rows_per_block).map_batches(
        _ScoringActor,
        fn_constructor_kwargs={"config": config, "score": score},
        compute=ActorPoolStrategy(
            size=actors.num_actors,
            max_concurrent_calls_per_actor=actors.concurrent_calls,
            enable_true_multi_threading=actors.concurrent_calls > 1,
        ),
        batch_size=rows_per_block,
        batch_format=None,  # as stored; see `_to_arrow`
        num_cpus=num_cpus,
        num_gpus=actors.num_gpus or None,
        udf_modifying_row_count=False,
    )


def _to_arrow(block: Any) -> pa.Table:
    """Return a block, which is a table of Arrow or a data frame of pandas, as a table.

    Ray converts data frames too, but it fails if a column contains lists that pandas has read from Parquet.
    """
    try:
        table: pa.Table = BlockAccessor.for_block(block).to_arrow()
    except Exception:  # Ray has made tensors of the lists, and its conversion of tensors raises several types
        return pa.table({name: pa.Array.from_pandas(block[name].astype(object)) for name in block})
    return table


class _ScoringActor:
    """Loads a scorer and applies a function to tables. Ray may call it in several threads."""

    def __init__(self, config: ScorerConfig, score: ScoreTable) -> None:
        # Ray hides an error that is raised here behind one of its own, so the first call raises it.
        self._error: RerankError | None = None
        try:
            self._scorer = Scorer.from_config(config)
        except RerankError as error:
            self._error = error.with_traceback(None)
        self._score = score

    def __call__(self, block: Any) -> pa.Table:
        if self._error is not None:
            raise self._error
        try:
            return self._score(self._scorer, _to_arrow(block))
        except (DeviceLostError, WorkerDiedError) as error:
            # Only a new process can help. Ray starts one, and it scores the blocks of this process again.
            logger.error("this actor ends, because its scorer failed: %s", error)
            logging.shutdown()
            os._exit(_STATUS_OF_LOST_ACTOR)


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
    """Return the values of a column. A string that is not UTF-8 becomes bytes, which no row may contain."""
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


def _with_absolute_paths(config: ScorerConfig) -> ScorerConfig:
    """Return a config whose paths do not depend on the working directory. That of an actor can be another.

    With `working_dir` in the runtime environment of the job, each actor has a copy of that folder as its own
    working directory. Relative paths then stay as they are.
    """
    if ray.get_runtime_context().runtime_env.get("working_dir") is not None:
        return config
    model, cache_folder = config.model, config.cache_folder
    with suppress(OSError):  # the name is too long for a folder
        if model != EMBEDDED_MODEL and Path(model).is_dir():
            model = str(Path(model).absolute())
    if cache_folder is not None:
        cache_folder = str(Path(cache_folder).expanduser().absolute())
    return dataclasses.replace(config, model=model, cache_folder=cache_folder)


def _warn_without_gpus(actors: ActorOptions) -> None:
    available = ray.cluster_resources().get("GPU", 0.0)
    if actors.num_gpus * actors.num_actors > available:
        logger.warning(
            "%d actor(s) reserve %g GPU(s) each, and the cluster has %g. The job waits until it has more.",
            actors.num_actors,
            actors.num_gpus,
            available,
        )


def _num_cpus(actors: ActorOptions, *, has_checkpoints: bool) -> float | None:
    """Return the CPUs that an actor reserves, or None for Ray's default of 1.

    Ray waits without an error for CPUs that never become free. The actors therefore leave some to Ray's own
    tasks.
    """
    available = ray.cluster_resources().get("CPU", 0.0)
    left = max(available - _CPUS_FOR_TASKS - (_CPUS_FOR_CHECKPOINTS if has_checkpoints else 0), 0.0)
    if actors.num_cpus is None:
        share = left / actors.num_actors
        return None if share >= 1 else math.floor(100 * share) / 100
    if actors.num_cpus * actors.num_actors > left:
        logger.warning(
            "%d actor(s) reserve %g CPU(s) each, and the cluster has %g. Ray needs %g for other tasks, so "
            "the job may wait forever. Reserve at most %g for each actor, or add CPUs.",
            actors.num_actors,
            actors.num_cpus,
            available,
            available - left,
            math.floor(100 * left / actors.num_actors) / 100,
        )
    return actors.num_cpus
