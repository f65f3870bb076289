"""Creates documents and nodes, and ranks texts with either adapter."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor
from bge_rerank_integrations.adapters.options import RerankOptions

QUERY = "what does a panda eat?"
Ranked = tuple[int, float | None]
ADAPTER_TYPES: list[type[RerankOptions]] = [BGEReranker, BGERerankPostprocessor]


def langchain_documents(texts: Sequence[str]) -> list[Document]:
    return [Document(page_content=text, metadata={"at": at}) for at, text in enumerate(texts)]


def llama_index_nodes(texts: Sequence[str]) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=str(at))) for at, text in enumerate(texts)]


def ranked_documents(documents: Sequence[Document]) -> list[Ranked]:
    return [(document.metadata["at"], document.metadata["relevance_score"]) for document in documents]


def ranked_nodes(nodes: Sequence[NodeWithScore]) -> list[Ranked]:
    return [(int(node.node_id), node.score) for node in nodes]


def rank_with(options: RerankOptions, texts: Sequence[str]) -> list[Ranked]:
    """Rank texts with an adapter of either framework."""
    if isinstance(options, BGEReranker):
        return ranked_documents(options.compress_documents(langchain_documents(texts), QUERY))
    assert isinstance(options, BGERerankPostprocessor)
    return ranked_nodes(options.postprocess_nodes(llama_index_nodes(texts), query_str=QUERY))


async def arank_with(options: RerankOptions, texts: Sequence[str]) -> list[Ranked]:
    """Do the same as `rank_with` with the async method."""
    if isinstance(options, BGEReranker):
        return ranked_documents(await options.acompress_documents(langchain_documents(texts), QUERY))
    assert isinstance(options, BGERerankPostprocessor)
    return ranked_nodes(await options.apostprocess_nodes(llama_index_nodes(texts), query_str=QUERY))
