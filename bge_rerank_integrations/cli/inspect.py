"""`bge-rerank info` and `bge-rerank check`: what would run here, and whether it runs right."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version

import click

from bge_rerank_integrations import __version__
from bge_rerank_integrations.cli.options import EXIT_BAD_DATA, config_options, json_option
from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.errors import CheckpointError, ConfigError, HubUnreachableError
from bge_rerank_integrations.published import TOLERANCE, check_published, require_published
from bge_rerank_integrations.scorer import Scorer

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "langchain-core", "llama-index-core")


@click.command()
@json_option
@config_options()
def info(config: ScorerConfig, as_json: bool) -> None:
    """Tell what this machine would use.

    And why, and what the model is; it is not loaded.

    \b
    bge-rerank info
    bge-rerank info --model BAAI/bge-reranker-v2-m3 --device cuda:1 --json
    """
    from bge_rerank_integrations.engine.describe import describe_checkpoint, describe_machine

    machine = describe_machine(config)
    versions = {"bge-rerank-integrations": __version__, **{name: _version(name) for name in _LIBRARIES}}
    try:
        checkpoint = describe_checkpoint(config)
        missing = None
    except HubUnreachableError:  # it was not asked: nothing is downloaded here
        checkpoint = None
        missing = (
            "not on this machine; the first use asks the hub for it. Where none can be reached, name a "
            f"folder, or take --model {EMBEDDED_MODEL}"
        )
    except (CheckpointError, ConfigError) as error:
        checkpoint, missing = None, f"not usable: {error}"
    if as_json:
        model = {"error": missing} if checkpoint is None else dataclasses.asdict(checkpoint)
        record = {"machine": dataclasses.asdict(machine), "model": {"name": config.model, **model}}
        click.echo(json.dumps({**record, "versions": versions}))
        return
    fast = {True: "yes", False: "no", None: "unknown"}[machine.bfloat16]
    limit = machine.max_graph_tokens
    graphs = f"up to {limit} tokens, once warmed up" if limit else "none"
    rows = {
        "device": f"{machine.device} ({machine.device_reason}): {machine.device_name}",
        "dtype": f"{machine.dtype} ({machine.dtype_reason}); fast bfloat16: {fast}",
        "attention": f"{machine.attention} ({machine.attention_reason})",
        "linear layers": f"{machine.linear} ({machine.linear_reason})",
        "between them": machine.between_products,
        "CUDA graphs": graphs,
        "batches": f"up to {machine.max_batch_tokens} tokens",
        "CPU threads": f"{machine.threads} of {machine.cores} cores ({machine.threads_reason})",
        "Python": machine.python,
        **{name: number or "not installed" for name, number in versions.items()},
        "model": config.model,
    }
    if checkpoint is None:
        rows[""] = str(missing)
    else:
        rows["  folder"] = checkpoint.folder
        rows["  size"] = (
            f"{checkpoint.num_bytes / 1e6:.1f} MB, {checkpoint.num_parameters / 1e6:.1f}M weights"
        )
        rows["  shape"] = (
            f"{checkpoint.num_layers} layers of {checkpoint.hidden_size}, {checkpoint.vocab_size} pieces"
        )
        rows["  limit"] = f"{checkpoint.max_length} tokens a pair"
    for name, value in rows.items():
        click.echo(f"{name:24} {value}")


@click.command()
@click.option("--as", "name", help="Whose scores to expect, for a local copy.  [default: --model]")
@json_option
@config_options()
@click.pass_context
def check(context: click.Context, config: ScorerConfig, name: str | None, as_json: bool) -> None:
    """Compare scores with the published ones.

    Tells whether a model computes on this machine what its authors say it does. Exit status 3 if they
    disagree by more than rounding explains.

    \b
    bge-rerank check --model BAAI/bge-reranker-large
    bge-rerank check --model models/large --as BAAI/bge-reranker-large --dtype bfloat16
    """
    require_published(name or config.model)  # before a model is downloaded for nothing
    with Scorer.from_config(config) as scorer:
        checks = check_published(scorer, name or config.model)
    agrees = all(result.agrees for result in checks)
    if as_json:
        pairs = [{**result._asdict(), "agrees": result.agrees} for result in checks]
        click.echo(json.dumps({"model": config.model, "agrees": agrees, "pairs": pairs}))
    else:
        click.echo(f"{'published':>10}{'here':>10}")
        for result in checks:
            verdict = "" if result.agrees else "   <- off"
            shown = result.passage if len(result.passage) <= 40 else result.passage[:39] + "…"
            click.echo(f"{result.published:10.4f}{result.score:10.4f}   {result.query} | {shown}{verdict}")
        click.echo("They agree." if agrees else f"They DISAGREE by more than {TOLERANCE}.")
    if not agrees:
        context.exit(EXIT_BAD_DATA)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
