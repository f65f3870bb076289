"""`SentenceTransformerRerank` of LlamaIndex, with its defaults."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.common import Pairs
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, scored_by_query, watch_module

_ALL = 1 << 30


def load(_: str, setup: Setup, __: ExitStack) -> Contender:
    """Load the node postprocessor."""
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode

    reranker = SentenceTransformerRerank(
        model=str(setup.plain), top_n=_ALL, device=setup.device, trust_remote_code=False
    )

    def rank(query: str, passages: list[str]) -> list[int]:
        nodes = [NodeWithScore(node=TextNode(text=text, id_=f"{row}")) for row, text in enumerate(passages)]
        return [int(found.node.node_id) for found in reranker.postprocess_nodes(nodes, query_str=query)]

    def run(pairs: Pairs, _: int | None) -> list[float]:
        return scored_by_query(pairs, rank)

    return Contender(
        name="SentenceTransformerRerank, LlamaIndex",
        dtype="float32",
        run=run,
        watch=watch_module(reranker._model.model),
        gives_order=True,
    )
