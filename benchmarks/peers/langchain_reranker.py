"""`CrossEncoderReranker` of LangChain with `HuggingFaceCrossEncoder`, with their defaults."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.common import Pairs
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, scored_by_query, watch_module

_ALL = 1 << 30


def load(_: str, setup: Setup, __: ExitStack) -> Contender:
    """Load the document compressor."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder
    from langchain_core.documents import Document

    encoder = HuggingFaceCrossEncoder(model_name=str(setup.plain), model_kwargs={"device": setup.device})
    reranker = CrossEncoderReranker(model=encoder, top_n=_ALL)

    def rank(query: str, passages: list[str]) -> list[int]:
        documents = [Document(text, metadata={"row": row}) for row, text in enumerate(passages)]
        return [found.metadata["row"] for found in reranker.compress_documents(documents, query)]

    def run(pairs: Pairs, _: int | None) -> list[float]:
        return scored_by_query(pairs, rank)

    return Contender(
        name="CrossEncoderReranker, LangChain",
        dtype="float32",
        run=run,
        watch=watch_module(encoder.client.model),
        gives_order=True,
    )
