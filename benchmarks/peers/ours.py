"""This package, alone and in both frameworks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import torch

from benchmarks.common import Pairs, cpu_features
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, NotAvailableError, scored_by_query
from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.config import DType
from bge_rerank_integrations.engine.cpu.int8_support import require_int8
from bge_rerank_integrations.engine.cuda.float8 import check_float8
from bge_rerank_integrations.engine.device import resolve_device, resolve_dtype
from bge_rerank_integrations.errors import ConfigError, DeviceError, RerankError


def load(dtype: str, setup: Setup, stack: ExitStack) -> Contender:
    """Load a scorer. The exit stack closes it."""
    require_dtype(dtype, setup)
    scorer = _scorer(setup, dtype, stack)
    return Contender(name="this package", dtype=dtype, run=lambda pairs, _: scorer.score(pairs))


def require_dtype(dtype: str, setup: Setup) -> None:
    """Check that the device computes in a precision itself.

    Raises:
        NotAvailableError: The device does not support the precision, or only emulates it.
    """
    config = ScorerConfig(device=setup.device)
    try:
        device, shape = resolve_device(config), setup.shape()
        resolve_dtype(replace(config, dtype=cast(DType, dtype)), device)
        if dtype == "int8":
            require_int8(shape.head_dim)
        if dtype == "float8":
            check_float8(device, (shape.hidden_size, shape.intermediate_size))
    except RerankError as error:
        raise NotAvailableError(str(error)) from error
    if dtype != "bfloat16":
        return
    if setup.on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotAvailableError("this GPU emulates bfloat16")
    if not setup.on_cuda and not cpu_features("bf16"):
        raise NotAvailableError("this CPU has no bfloat16 arithmetic")


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
