"""The last lines of a command's output: how many texts were truncated, and which precision ran."""

from __future__ import annotations

import click

from bge_rerank_integrations.cli.console import wrap
from bge_rerank_integrations.config import ScorerConfig


def print_summary(num_truncated: int, num_truncated_queries: int, config: ScorerConfig) -> None:
    """Print on stderr how many texts were truncated, if any, and which precision ran.

    Args:
        num_truncated: As in `describe_truncation`.
        num_truncated_queries: As in `describe_truncation`.
        config: As in `describe_truncation`.
    """
    if truncation := describe_truncation(num_truncated, num_truncated_queries, config):
        click.echo(wrap(truncation), err=True)
    click.echo(wrap(describe_precision_used(config)), err=True)


def describe_truncation(num_truncated: int, num_truncated_queries: int, config: ScorerConfig) -> str | None:
    """Return a message that says how many texts lost tokens and which options avoid that.

    Args:
        num_truncated: Number of pairs whose passage was too long.
        num_truncated_queries: Number of queries that were too long.
        config: The settings that the texts were scored with.

    Returns:
        The message, or None if no text lost tokens.
    """
    lines = []
    if num_truncated:
        lines.append(
            f"{num_truncated} passage(s) were cut to fit --max-length {config.max_length}. To score whole "
            "passages, use `--long-passages windows`."
        )
    if num_truncated_queries:
        lines.append(
            f"Queries that were cut to {config.effective_query_max_length} tokens: {num_truncated_queries}. "
            "See --query-max-length and --query-truncation-side."
        )
    return " ".join(lines) or None


def describe_precision_used(config: ScorerConfig) -> str:
    """Return a message that names the device and precision that ran, and any precision that is faster."""
    from bge_rerank_integrations.engine.describe import describe_precision

    precision = describe_precision(config)
    line = f"Ran on {precision.device} in {precision.dtype}"
    if precision.faster is None:
        return f"{line}."
    line = f"{line}; --dtype {precision.faster} is faster on this machine"
    if precision.faster_extra is None:
        return f"{line}."
    return f'{line} and needs `pip install "bge-rerank-integrations[{precision.faster_extra}]"`.'
