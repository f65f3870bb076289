"""`bge-rerank info` shows what would run on this machine; `bge-rerank check` verifies a model's scores."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

import click

from bge_rerank_integrations import __version__
from bge_rerank_integrations.cli.console import WIDTH, cut, require_stdout, wrap
from bge_rerank_integrations.cli.options import EXIT_BAD_DATA, config_options, json_option, name_options
from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.errors import CheckpointError, ConfigError, HubUnreachableError
from bge_rerank_integrations.evaluation.reference_scores import check_scores, require_reference
from bge_rerank_integrations.scorer import Scorer

if TYPE_CHECKING:
    from bge_rerank_integrations.engine.describe import CheckpointReport, MachineReport

_LABEL_WIDTH: Final = 24
_NO_HUB: Final = f"If no model hub can be reached, use a local folder or `--model {EMBEDDED_MODEL}`"
_NOT_HERE: Final = f"not on this machine; the first use downloads it from the hub. {_NO_HUB}"
_LIBRARIES: Final = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "langchain-core",
    "llama-index-core",
)


@click.command()
@json_option
@config_options()
@click.pass_context
def info(context: click.Context, config: ScorerConfig, as_json: bool) -> None:
    """Show the device and settings that would be used, and why.

    The command describes the machine and the model. It neither loads nor downloads
    the model, and it does not ask the hub. The exit status is 1 if the model cannot
    be used.

    \b
    bge-rerank info
    bge-rerank info --model BAAI/bge-reranker-v2-m3 --device cuda:1 --json
    """
    from bge_rerank_integrations.engine.describe import describe_checkpoint, describe_machine

    require_stdout()
    machine = describe_machine(config)
    versions = {"bge-rerank-integrations": __version__, **{name: _version(name) for name in _LIBRARIES}}
    checkpoint, problem, usable = None, None, True
    try:
        checkpoint = describe_checkpoint(config)
    except HubUnreachableError:  # `info` does not ask the hub: the model is not in the cache
        usable = not config.local_files_only
        problem = _NOT_HERE if usable else f"not usable: not on this machine. {_NO_HUB}"
    except (CheckpointError, ConfigError) as error:
        problem, usable = f"not usable: {name_options(str(error))}", False
    if as_json:
        model = {"error": problem} if checkpoint is None else dataclasses.asdict(checkpoint)
        record = {
            "machine": dataclasses.asdict(machine),
            "model": {"name": config.model, "usable": usable, **model},
        }
        click.echo(json.dumps({**record, "versions": versions}))
    else:
        rows = {
            **_machine_rows(machine),
            **{name: number or "not installed" for name, number in versions.items()},
            "model": config.model,
            **({"": problem or ""} if checkpoint is None else _checkpoint_rows(checkpoint)),
        }
        for name, value in rows.items():
            click.echo(wrap(f"{name:{_LABEL_WIDTH}} {value}", indent=_LABEL_WIDTH + 1))
    if not usable:
        context.exit(1)


def _machine_rows(machine: MachineReport) -> dict[str, str]:
    fast = {True: "yes", False: "no", None: "measure to find out"}[machine.bfloat16]
    limit = machine.max_graph_tokens
    return {
        "device": f"{machine.device} ({machine.device_reason}): {machine.device_name}",
        "dtype": f"{machine.dtype} ({machine.dtype_reason}); fast bfloat16: {fast}",
        "attention": f"{machine.attention} ({machine.attention_reason})",
        "linear layers": f"{machine.linear} ({machine.linear_reason})",
        "other operations": machine.between_products,
        "CUDA graphs": f"for batches of at most {limit} tokens, fewer on slow devices" if limit else "none",
        "batches": f"up to {machine.max_batch_tokens} tokens",
        "CPU threads": f"{machine.threads} of {machine.cores} cores ({machine.threads_reason})",
        "Python": machine.python,
    }


def _checkpoint_rows(checkpoint: CheckpointReport) -> dict[str, str]:
    return {
        "  folder": checkpoint.folder,
        "  size": f"{checkpoint.num_bytes / 1e6:.1f} MB, {checkpoint.num_parameters / 1e6:.1f}M weights",
        "  shape": f"{checkpoint.num_layers} layers, hidden size {checkpoint.hidden_size}, "
        f"vocabulary of {checkpoint.vocab_size} tokens",
        "  limit": f"{checkpoint.max_length} tokens per pair",
    }


@click.command()
@click.option(
    "--as",
    "name",
    metavar="MODEL",
    help="Model whose known scores are expected, if --model is a local copy of it.  [default: --model]",
)
@json_option
@config_options()
@click.pass_context
def check(context: click.Context, config: ScorerConfig, name: str | None, as_json: bool) -> None:
    """Compare a model's scores with known scores.

    The command verifies that a model computes the right scores on this machine. It
    compares them with scores that the model's authors or users published. For the
    embedded model, it compares them with scores that this package recorded. The exit
    status is 3 if the scores differ by more than the precision's rounding errors.

    \b
    bge-rerank check --model embedded
    bge-rerank check --model BAAI/bge-reranker-large
    bge-rerank check --model models/large --as BAAI/bge-reranker-large
    """
    from bge_rerank_integrations.engine.describe import describe_precision

    require_stdout()
    reference = require_reference(name or config.model)  # may fail, so it comes before any download
    precision = describe_precision(config)
    with Scorer.from_config(config) as scorer:
        checks = check_scores(scorer, reference, precision.dtype)
    agrees = all(result.agrees for result in checks)
    if as_json:
        pairs = [{**result._asdict(), "agrees": result.agrees} for result in checks]
        record = {
            "model": config.model,
            "device": precision.device,
            "dtype": precision.dtype,
            "source": reference.source,
            "agrees": agrees,
            "pairs": pairs,
        }
        click.echo(json.dumps(record))
    else:
        click.echo(wrap(f"Source of the expected scores: {reference.source}."))
        click.echo(f"\n{'expected':>10}{'here':>10}")
        for result in checks:
            verdict = "" if result.agrees else "   <- differs"
            line = f"{result.expected:10.4f}{result.score:10.4f}   "
            click.echo(
                line + cut(f"{result.query} | {result.passage}", WIDTH - len(line) - len(verdict)) + verdict
            )
        tolerance = max(result.tolerance for result in checks)
        verdict = "The scores agree" if agrees else "The scores DISAGREE"
        click.echo(f"\n{verdict} (tolerance {tolerance:.4g}, {precision.dtype} on {precision.device}).")
    if not agrees:
        context.exit(EXIT_BAD_DATA)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
