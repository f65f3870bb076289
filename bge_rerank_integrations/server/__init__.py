"""An HTTP server that speaks the rerank dialects of Cohere, Jina, TEI, vLLM, Infinity, Voyage and NVIDIA."""

from bge_rerank_integrations.server.app import create_app
from bge_rerank_integrations.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
