"""The options of `bge-rerank rank` for a job on a Ray cluster. Nothing here needs Ray."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Final

import click

_Command = Callable[..., None]

# What `--ray` can be followed by. Anything else is the command's SOURCE.
_ADDRESS: Final = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
_ANY_CLUSTER: Final = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    num_actors: int = 1
    cpus_per_actor: float | None = None
    gpus_per_actor: float = 0.0
    rows_per_block: int | None = None
    query_column: str = "query"
    passages_column: str = "passages"


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
    names = [field.name for field in dataclasses.fields(RayOptions) if field.name != "address"]

    @functools.wraps(command)
    def with_ray(ray_address: str | None, **values: Any) -> None:
        given = {name: value for name in names if (value := values.pop(name)) is not None}
        if ray_address is None and given:
            unused = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"{unused} can only be used with --ray")
        on_ray = None if ray_address is None else RayOptions(address=ray_address, **given)
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
