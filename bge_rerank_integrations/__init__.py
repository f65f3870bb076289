"""Fast BGE reranking on your own hardware, inside LangChain and LlamaIndex.

Names are imported on first use, so that importing the package loads neither torch nor a framework.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bge_rerank_integrations.batching.stats import ScorerHealth, ScorerStats
    from bge_rerank_integrations.config import ScorerConfig
    from bge_rerank_integrations.errors import (
        AuthenticationError,
        CheckpointError,
        CheckpointNotFoundError,
        ConfigError,
        CorruptCheckpointError,
        DatasetError,
        DeviceError,
        DeviceLostError,
        ForkedProcessError,
        HubUnreachableError,
        InputError,
        InputTypeError,
        MissingExtraError,
        NonFiniteScoreError,
        QueueFullError,
        RemoteError,
        RequestTimeoutError,
        RerankError,
        ScorerClosedError,
        ServerUnreachableError,
        UnsupportedCheckpointError,
        WorkerDiedError,
    )
    from bge_rerank_integrations.langchain import BGEReranker
    from bge_rerank_integrations.llama_index import BGERerankPostprocessor
    from bge_rerank_integrations.protocols import SupportsRank
    from bge_rerank_integrations.ranking import RankedPassage, Ranking
    from bge_rerank_integrations.remote import RemoteScorer
    from bge_rerank_integrations.scorer import Scorer

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "BGERerankPostprocessor",
    "BGEReranker",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "CorruptCheckpointError",
    "DatasetError",
    "DeviceError",
    "DeviceLostError",
    "ForkedProcessError",
    "HubUnreachableError",
    "InputError",
    "InputTypeError",
    "MissingExtraError",
    "NonFiniteScoreError",
    "QueueFullError",
    "RankedPassage",
    "Ranking",
    "RemoteError",
    "RemoteScorer",
    "RequestTimeoutError",
    "RerankError",
    "Scorer",
    "ScorerClosedError",
    "ScorerConfig",
    "ScorerHealth",
    "ScorerStats",
    "ServerUnreachableError",
    "SupportsRank",
    "UnsupportedCheckpointError",
    "WorkerDiedError",
    "__version__",
]

_HOME = {
    "AuthenticationError": "errors",
    "BGERerankPostprocessor": "llama_index",
    "BGEReranker": "langchain",
    "CheckpointError": "errors",
    "CheckpointNotFoundError": "errors",
    "ConfigError": "errors",
    "CorruptCheckpointError": "errors",
    "DatasetError": "errors",
    "DeviceError": "errors",
    "DeviceLostError": "errors",
    "ForkedProcessError": "errors",
    "HubUnreachableError": "errors",
    "InputError": "errors",
    "InputTypeError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteScoreError": "errors",
    "QueueFullError": "errors",
    "RankedPassage": "ranking",
    "Ranking": "ranking",
    "RemoteError": "errors",
    "RemoteScorer": "remote",
    "RequestTimeoutError": "errors",
    "RerankError": "errors",
    "Scorer": "scorer",
    "ScorerClosedError": "errors",
    "ScorerConfig": "config",
    "ScorerHealth": "batching.stats",
    "ScorerStats": "batching.stats",
    "ServerUnreachableError": "errors",
    "SupportsRank": "protocols",
    "UnsupportedCheckpointError": "errors",
    "WorkerDiedError": "errors",
}

# The library that a name cannot be imported without.
_LIBRARY = {
    "BGERerankPostprocessor": "llama_index.core",
    "BGEReranker": "langchain_core",
    "RemoteScorer": "httpx",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # help() and inspect.getmembers() import every name that is listed here.
    return sorted(name for name in __all__ if name not in _LIBRARY or _is_installed(_LIBRARY[name]))


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ImportError:  # its parent is missing
        return False
