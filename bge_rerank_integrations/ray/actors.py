"""A pool of Ray actors, each with a scorer of its own: what they reserve, and what runs in them."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.errors import (
    ConfigError,
    DeviceLostError,
    RerankError,
    WorkerDiedError,
    missing_extra,
)

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, Dataset
    from ray.data.block import BlockAccessor
    from ray.util.client import ray as client
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.scorer import Scorer

logger = logging.getLogger("bge_rerank_integrations.ray")

ScoreTable = Callable[[Scorer, pa.Table], pa.Table]
"""Returns a table with one row for each row of the given table."""

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
        num_cpus: Logical CPUs that each actor reserves. None means 1, or a fraction of 1 if Ray needs the
            rest for reading and writing, now or after the cluster has lost a node. An actor uses one thread
            for each whole CPU that it reserves, and at least one, unless the config sets `num_threads`.
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
        _check_count("num_actors", self.num_actors)
        _check_count("concurrent_calls", self.concurrent_calls)
        if self.rows_per_block is not None:
            _check_count("rows_per_block", self.rows_per_block)
        if self.num_cpus is not None:
            _check_amount("num_cpus", self.num_cpus)
        _check_amount("num_gpus", self.num_gpus)


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

    Raises:
        ConfigError: This process uses Ray Client.
    """
    _check_no_ray_client()
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


def _check_no_ray_client() -> None:
    """Raise `ConfigError` if this process is connected by Ray Client, on which Ray Data does not run."""
    if client.is_connected():
        raise ConfigError(
            "Ray Data does not run over Ray Client (ray://); run the program on a machine of the cluster, or "
            "with `ray job submit`"
        )


def _to_arrow(block: Any) -> pa.Table:
    """Return a block, which is a table of Arrow or a data frame of pandas, as a table.

    Ray converts data frames too, but it fails if a column contains lists that pandas has read from Parquet.
    """
    try:
        table: pa.Table = BlockAccessor.for_block(block).to_arrow()
    except Exception:  # Ray has made tensors of the lists, and its conversion of tensors raises several types
        return pa.table({name: _column_to_arrow(block[name].astype(object)) for name in block})
    return table


def _column_to_arrow(values: Any) -> Any:
    """Return a series of objects as an array. Ray pickles values of different types, for example."""
    try:
        return pa.Array.from_pandas(values)
    except pa.ArrowException:
        return BlockAccessor.for_block(values.to_frame()).to_arrow().column(0)


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


def _check_count(name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{name} must be an integer of at least 1")


def _check_amount(name: str, amount: object) -> None:
    if not isinstance(amount, int | float) or isinstance(amount, bool) or not 0 <= amount < math.inf:
        raise ConfigError(f"{name} must be a number of at least 0")


def _with_absolute_paths(config: ScorerConfig) -> ScorerConfig:
    """Return a config whose paths do not depend on the working directory, which an actor may not share.

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
    tasks. By default, they leave enough even after the loss of the largest node, if the other nodes have
    enough CPUs.
    """
    available = ray.cluster_resources().get("CPU", 0.0)
    for_tasks = _CPUS_FOR_TASKS + (_CPUS_FOR_CHECKPOINTS if has_checkpoints else 0)
    left = max(available - for_tasks, 0.0)
    if actors.num_cpus is None:
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        left_after_loss = available - max(nodes, default=0.0) - for_tasks
        share = (left_after_loss if left_after_loss > 0 else left) / actors.num_actors
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
