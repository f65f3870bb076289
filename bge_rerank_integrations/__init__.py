"""Fast, exact BGE reranking on your own hardware, inside LangChain and LlamaIndex.

Names are imported on first use, so that importing the package loads neither torch nor a framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bge_rerank_integrations.config import ScorerConfig
    from bge_rerank_integrations.errors import RerankError
    from bge_rerank_integrations.langchain import BGEReranker
    from bge_rerank_integrations.llama_index import BGERerankPostprocessor
    from bge_rerank_integrations.ranking import RankedPassage, Ranking
    from bge_rerank_integrations.remote import RemoteScorer
    from bge_rerank_integrations.scorer import Scorer, SupportsRank

__version__ = "0.1.0"

__all__ = [
    "BGERerankPostprocessor",
    "BGEReranker",
    "RankedPassage",
    "Ranking",
    "RemoteScorer",
    "RerankError",
    "Scorer",
    "ScorerConfig",
    "SupportsRank",
    "__version__",
]

_HOME = {
    "BGERerankPostprocessor": "llama_index",
    "BGEReranker": "langchain",
    "RankedPassage": "ranking",
    "Ranking": "ranking",
    "RemoteScorer": "remote",
    "RerankError": "errors",
    "Scorer": "scorer",
    "ScorerConfig": "config",
    "SupportsRank": "scorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
