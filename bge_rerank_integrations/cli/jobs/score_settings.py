"""The settings that the scores of a ranking job depend on. A job can only be resumed with the same ones."""

from __future__ import annotations

from typing import Any, Final

from bge_rerank_integrations import __version__
from bge_rerank_integrations.config import ScorerConfig

# These change scores by rounding errors at most. The digest of the checkpoint stands for its revision.
_WITHOUT_INFLUENCE: Final = frozenset(
    {
        "revision",
        "cache_folder",
        "local_files_only",
        "devices",
        "num_threads",
        "max_wait_ms",
        "max_queued_tokens",
    }
)


def settings_of_scores(config: ScorerConfig) -> dict[str, Any]:
    """Return the settings that scores depend on, with the version of the package and the checkpoint.

    A `device` or `dtype` of `auto` stays as it is.

    Args:
        config: A config from `pin_checkpoint`. Its checkpoint is on this machine.
    """
    from bge_rerank_integrations.engine.describe import describe_checkpoint

    settings = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_INFLUENCE}
    return {
        **settings,
        "version": __version__,
        "checkpoint": describe_checkpoint(config).fingerprint,
    }
