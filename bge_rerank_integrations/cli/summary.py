"""The last lines of a command: what was cut off, and which precision ran."""

from __future__ import annotations

from bge_rerank_integrations.config import ScorerConfig


def describe_truncation(num_truncated: int, config: ScorerConfig) -> str | None:
    """Say how many pairs lost tokens and which option avoids that; None where none did.

    Args:
        num_truncated: Pairs whose query or passage was too long.
        config: The settings they were scored with.
    """
    if not num_truncated:
        return None
    if config.long_passages == "windows":
        return (
            f"{num_truncated} pair(s) with a query of more than {config.effective_query_max_length} tokens: "
            "the query was cut (--query-max-length)."
        )
    return (
        f"{num_truncated} pair(s) longer than {config.max_length} tokens: the passage or the query was cut. "
        "--long-passages windows reads passages to their end."
    )


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
