"""How fast this package is beside its peers, and what faster precisions do to its rankings.

    python -m benchmarks {speed,length,linear,memory,fidelity,gpu} ...

`benchmarks/README.md` says what is compared and how to read it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import torch

from benchmarks import fidelity, gpu, length, linear, memory, speed
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
}
DEFAULT_CONTENDERS: Final = {
    "linear": OURS,
    "fidelity": fidelity.DEFAULT_CONTENDERS,
    "gpu": gpu.DEFAULT_CONTENDERS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 is done, 1 a problem that was found or an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: _add_command(commands, name, module) for name, module in COMMANDS.items()}
    args = parser.parse_args(argv)
    chosen, module = parsers[args.command], COMMANDS[args.command]
    if args.repeats < 1:
        chosen.error("--repeats must be positive")
    try:
        args.contenders = select(args.contenders)
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
        "--shape", choices=SHAPES, default="base", help="random weights in this shape; default: base"
    )
    models.add_argument("--model", help="checkpoint folder, hub id or `embedded`, instead of random weights")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pairs; weights are always the same")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts; default: 5")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=DEFAULT_CONTENDERS.get(name, list(ENTRIES)),
        metavar="NAME",
        help=f"of {', '.join(ENTRIES)}; or how some of them begin",
    )
    module.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
