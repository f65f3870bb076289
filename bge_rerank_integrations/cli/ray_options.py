"""The options of `bge-rerank rank` for a job on a Ray cluster. Nothing here needs Ray."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import click

_Command = Callable[..., None]

# What `--ray` can be followed by. Anything else is the command's SOURCE.
_ADDRESS: Final = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
_ANY_CLUSTER: Final = ""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """The options of `rank` that only have a meaning on Ray.

    Attributes:
        address: Address of the cluster, or an empty string for the cluster in `RAY_ADDRESS` or a local one.
        num_actors: Number of actors.
        cpus_per_actor: Logical CPUs that each actor reserves; None leaves it to the package.
        gpus_per_actor: GPUs that each actor reserves.
        rows_per_block: Maximum number of rows in a block and in an output file; None means the default.
        query_column: Column of a Parquet file with the query.
        passages_column: Column of a Parquet file with the passages.
    """

    address: str
    num_actors: int
    cpus_per_actor: float | None
    gpus_per_actor: float
    rows_per_block: int | None
    query_column: str
    passages_column: str


class RankCommand(click.Command):
    """Lets the address after `--ray` be left out, although SOURCE may follow."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give `--ray` an empty address if the next argument is not one."""
        args = list(args)
        for index, arg in enumerate(args):
            if arg == "--ray" and not _ADDRESS.fullmatch("".join(args[index + 1 : index + 2])):
                args[index] = f"--ray={_ANY_CLUSTER}"
        return super().parse_args(ctx, args)


def ray_options(command: _Command) -> _Command:
    """Add the options of a job on Ray. The command receives them as `on_ray`, or None without `--ray`."""
    defaults: dict[str, Any] = {
        "num_actors": 1,
        "cpus_per_actor": None,
        "gpus_per_actor": 0.0,
        "rows_per_block": None,
        "query_column": "query",
        "passages_column": "passages",
    }

    @functools.wraps(command)
    def with_ray(ray_address: str | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in defaults}
        unused = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if ray_address is None and unused:
            raise click.UsageError(f"{', '.join(unused)} can only be used with --ray")
        chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
        on_ray = None if ray_address is None else RayOptions(address=ray_address, **chosen)
        command(on_ray=on_ray, **values)

    decorated: _Command = with_ray
    for option in (
        click.option("--passages-column", help="Parquet column with the passages.  [default: passages]"),
        click.option("--query-column", help="Parquet column with the query.  [default: query]"),
        click.option(
            "--rows-per-block",
            type=click.IntRange(min=1),
            help="Maximum number of requests in an output file, and of requests to rank again after a "
            "failure.  [default: 256]",
        ),
        click.option(
            "--gpus-per-actor",
            type=click.FloatRange(min=0),
            help="GPUs that each actor reserves.  [default: 0]",
        ),
        click.option(
            "--cpus-per-actor",
            type=click.FloatRange(min=0),
            help="Logical CPUs that each actor reserves.  [default: 1, or less on a small machine]",
        ),
        click.option(
            "--num-actors",
            type=click.IntRange(min=1),
            help="Processes that load the model and rank.  [default: 1]",
        ),
        click.option(
            "--ray",
            "ray_address",
            metavar="[ADDRESS]",
            help="Rank a folder on the Ray cluster at ADDRESS.  [default: RAY_ADDRESS, or this machine]",
        ),
    ):
        decorated = option(decorated)
    return decorated
