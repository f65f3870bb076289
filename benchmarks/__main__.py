"""Compare this package's speed and memory with its peers, and faster precisions with float32.

    python -m benchmarks {speed,length,linear,memory,fidelity,gpu,device,ray,serve} ...

`benchmarks/README.md` explains what is compared and how to read the output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Final

import torch

from benchmarks import fidelity, gpu, length, linear, memory, ray_cluster, serve, simulated_device, speed
from benchmarks.models import SHAPES
from benchmarks.peers.registry import ENTRIES, OURS, select
from benchmarks.plots import check_plots
from bge_rerank_integrations.errors import RerankError

COMMANDS: Final[dict[str, ModuleType]] = {
    "speed": speed,
    "length": length,
    "linear": linear,
    "memory": memory,
    "fidelity": fidelity,
    "gpu": gpu,
    "device": simulated_device,
    "serve": serve,
    "ray": ray_cluster,
}
# Contenders of commands that do not compare those of `benchmarks.peers`.
CONTENDERS: Final[dict[str, Collection[str]]] = {"serve": serve.CONTENDERS}
DEFAULT_CONTENDERS: Final = {
    "linear": OURS,
    "fidelity": fidelity.DEFAULT_CONTENDERS,
    "gpu": gpu.DEFAULT_CONTENDERS,
    "serve": ["http"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 for success, and 1 for an error or a problem with the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: _add_command(commands, name, module) for name, module in COMMANDS.items()}
    args = parser.parse_args(argv)
    chosen, module = parsers[args.command], COMMANDS[args.command]
    if args.repeats < 1:
        chosen.error("--repeats must be positive")
    try:
        args.contenders = select(args.contenders, CONTENDERS.get(args.command, ENTRIES))
    except ValueError as error:
        chosen.error(str(error))
    module.check_arguments(chosen, args)
    try:
        if getattr(args, "plot", None):
            check_plots()
        status: int = module.run(args)
    except RerankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: ModuleType
) -> argparse.ArgumentParser:
    description = (module.__doc__ or "").partition(": ")[2]
    parser = commands.add_parser(name, help=description, description=description)
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--shape", choices=SHAPES, default="base", help="use random weights in this shape; default: base"
    )
    models.add_argument("--model", help="use this model instead: a checkpoint folder, hub id or `embedded`")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the pairs; the weights do not depend on it"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of timed runs; the median is reported; default: 5"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=DEFAULT_CONTENDERS.get(name, list(ENTRIES)),
        metavar="NAME",
        help=f"contenders to run, or prefixes of their names: {', '.join(CONTENDERS.get(name, ENTRIES))}",
    )
    module.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
