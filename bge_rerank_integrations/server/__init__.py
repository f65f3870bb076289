"""An HTTP server that speaks the rerank dialects of Cohere, Jina, TEI, vLLM, Infinity, Voyage and NVIDIA.

`create_app` is imported on first use, so that the command line can name the limits without starlette.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bge_rerank_integrations.server.settings import ServerSettings

if TYPE_CHECKING:
    from bge_rerank_integrations.server.app import create_app

__all__ = ["ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bge_rerank_integrations.server.app import create_app

    globals()[name] = create_app
    return create_app


def __dir__() -> list[str]:
    return sorted(__all__)
