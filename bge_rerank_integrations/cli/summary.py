"""The last lines of a command: what was cut off, and which precision ran."""

from __future__ import annotations

from bge_rerank_integrations.config import ScorerConfig


def describe_truncation(num_truncated: int, num_truncated_queries: int, config: ScorerConfig) -> str | None:
    """Say how many texts lost tokens and which options avoid that; None where none did.

    Args:
        num_truncated: Pairs whose passage was too long.
        num_truncated_queries: Queries that were too long.
        config: The settings they were scored with.
    """
    lines = []
    if num_truncated:
        lines.append(
            f"{num_truncated} passage(s) were cut to fit --max-length {config.max_length}: --long-passages "
            "windows reads them to their end."
        )
    if num_truncated_queries:
        lines.append(
            f"Queries cut to {config.effective_query_max_length} tokens: {num_truncated_queries} "
            "(--query-max-length, --query-truncation-side)."
        )
    return " ".join(lines) or None


def describe_precision_used(config: ScorerConfig) -> str:
    """Say on which device and in which precision a command ran, and which option is faster."""
    from bge_rerank_integrations.engine.describe import describe_precision

    precision = describe_precision(config)
    line = f"Ran on {precision.device} in {precision.dtype}"
    if precision.faster is None:
        return f"{line}."
    line = f"{line}; --dtype {precision.faster} is faster on this machine"
    if precision.faster_extra is None:
        return f"{line}."
    return f'{line} and needs `pip install "bge-rerank-integrations[{precision.faster_extra}]"`.'
