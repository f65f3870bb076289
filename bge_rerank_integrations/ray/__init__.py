"""Ray Data and Ray Serve over the same scorer as everything else. Needs the extra `ray`.

Names are imported on first use, so that a worker of a batch job does not import Ray Serve.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bge_rerank_integrations.ray.actors import ActorOptions
    from bge_rerank_integrations.ray.data import rerank_dataset, score_dataset
    from bge_rerank_integrations.ray.scorer import ServeScorer
    from bge_rerank_integrations.ray.serve import ServeArguments, app

__all__ = ["ActorOptions", "ServeArguments", "ServeScorer", "app", "rerank_dataset", "score_dataset"]

_HOME = {
    "ActorOptions": "actors",
    "ServeArguments": "serve",
    "ServeScorer": "scorer",
    "app": "serve",
    "rerank_dataset": "data",
    "score_dataset": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
