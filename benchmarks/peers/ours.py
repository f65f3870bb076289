"""This package, alone and in both frameworks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

from benchmarks.common import Pairs, cpu_features
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, NotAvailableError, scored_by_query
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.config import DType
from bge_rerank_integrations.errors import ConfigError, DeviceError


def load(dtype: str, setup: Setup, stack: ExitStack) -> Contender:
    """Load a scorer. The exit stack closes it."""
    if dtype == "bfloat16" and not setup.on_cuda and not cpu_features("bf16"):
        raise NotAvailableError("this CPU has no bfloat16 arithmetic")
    scorer = _scorer(setup, dtype, stack)
    return Contender(name="Scorer.score", dtype=dtype, run=lambda pairs, _: scorer.score(pairs))


def load_langchain(_: str, setup: Setup, stack: ExitStack) -> Contender:
    """Load the LangChain adapter with its defaults."""
    from langchain_core.documents import Document

    from bge_rerank_integrations import BGEReranker

    reranker = BGEReranker(scorer=_scorer(setup, "auto", stack, normalize=True))

    def rank(query: str, passages: list[str]) -> list[int]:
        documents = [Document(text, metadata={"row": row}) for row, text in enumerate(passages)]
        return [found.metadata["row"] for found in reranker.compress_documents(documents, query)]

    def run(pairs: Pairs, _: int | None) -> list[float]:
        return scored_by_query(pairs, rank)

    return Contender(name="BGEReranker, LangChain", dtype=_auto(setup), run=run, gives_order=True)


def load_llama_index(_: str, setup: Setup, stack: ExitStack) -> Contender:
    """Load the LlamaIndex adapter with its defaults."""
    from llama_index.core.schema import NodeWithScore, TextNode

    from bge_rerank_integrations import BGERerankPostprocessor

    reranker = BGERerankPostprocessor(scorer=_scorer(setup, "auto", stack, normalize=True))

    def rank(query: str, passages: list[str]) -> list[int]:
        nodes = [NodeWithScore(node=TextNode(text=text, id_=f"{row}")) for row, text in enumerate(passages)]
        return [int(found.node.node_id) for found in reranker.postprocess_nodes(nodes, query_str=query)]

    def run(pairs: Pairs, _: int | None) -> list[float]:
        return scored_by_query(pairs, rank)

    return Contender(name="BGERerankPostprocessor, LlamaIndex", dtype=_auto(setup), run=run, gives_order=True)


def _scorer(setup: Setup, dtype: str, stack: ExitStack, *, normalize: bool = False) -> Scorer:
    try:
        scorer = Scorer(setup.model, device=setup.device, dtype=cast(DType, dtype), normalize=normalize)
    except (ConfigError, DeviceError) as error:
        raise NotAvailableError(str(error)) from error
    return stack.enter_context(scorer)


def _auto(setup: Setup) -> str:
    return "float16" if setup.on_cuda else "float32"
