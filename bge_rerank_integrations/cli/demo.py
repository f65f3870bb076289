"""`bge-rerank demo`: the standard library's documentation, searched with BM25 and reranked."""

from __future__ import annotations

import time

import click

from bge_rerank_integrations.bm25 import Bm25
from bge_rerank_integrations.cli.options import config_options
from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.errors import MissingExtraError, RerankError, missing_extra
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.stdlib_docs import QUESTIONS, read_stdlib_docs

_WIDTH = 100
_NAME_WIDTH = 36


@click.command()
@click.argument("questions", nargs=-1, metavar="[QUESTION]...")
@click.option("--top-n", type=click.IntRange(min=1), default=3, show_default=True, help="Passages to show.")
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Passages of each question to rerank.",
)
@config_options(default_model=EMBEDDED_MODEL)
def demo(config: ScorerConfig, questions: tuple[str, ...], top_n: int, depth: int) -> None:
    """See reranking work, through LangChain and LlamaIndex.

    The passages are the documentation of the installed Python's standard library, which BM25 searches
    first. Ten questions come with it; yours are as good.

    \b
    bge-rerank demo
    bge-rerank demo "run a function later in another thread"
    """
    try:
        from langchain_core.documents import Document
        from llama_index.core.schema import NodeWithScore, TextNode

        from bge_rerank_integrations.langchain import BGEReranker
        from bge_rerank_integrations.llama_index import BGERerankPostprocessor
    except ImportError as error:
        raise missing_extra("demo", "langchain-core or llama-index-core") from error

    docs = read_stdlib_docs()
    try:
        search = Bm25(docs)
    except MissingExtraError as error:
        raise missing_extra("demo", "bm25s") from error
    with Scorer.from_config(config) as scorer:
        click.echo(
            f"{len(docs)} passages: what Python's standard library says of itself. Model: {config.model}"
        )
        langchain = BGEReranker(scorer=scorer, top_n=top_n, keep_retrieval_score=True)
        llama_index = BGERerankPostprocessor(scorer=scorer, top_n=top_n, keep_retrieval_score=True)
        scorer.warmup()
        num_pairs, seconds = 0, 0.0
        for question in questions or QUESTIONS:
            found = search.search({"": question}, depth)[""]
            documents = [Document(id=name, page_content=docs[name]) for name in found]
            nodes = [
                NodeWithScore(node=TextNode(id_=name, text=docs[name]), score=found[name]) for name in found
            ]
            started = time.perf_counter()
            after = langchain.compress_documents(documents, question)
            seconds += time.perf_counter() - started
            num_pairs += len(documents)
            nodes_after = llama_index.postprocess_nodes(nodes, query_str=question)
            if [document.id for document in after] != [node.node.node_id for node in nodes_after]:
                raise RerankError("the two frameworks gave different orders, which must never be")
            click.echo(f"\n{'─' * _WIDTH}\n{question}\n")
            if not found:
                click.echo("No passage shares a word with it.")
                continue
            click.echo(
                f"    {'BM25, before':{_NAME_WIDTH}}  {'reranked, after':{_NAME_WIDTH}}{'was':>5}{'score':>8}"
            )
            for rank, (before, document) in enumerate(zip(found, after, strict=False), start=1):
                was = f"#{document.metadata['retrieval_rank'] + 1}"
                name = str(document.id)
                click.echo(
                    f"{rank:>3} {_cut(before):{_NAME_WIDTH}}  {_cut(name):{_NAME_WIDTH}}{was:>5}"
                    f"{document.metadata['relevance_score']:8.2f}"
                )
            best = after[0].page_content.partition(": ")[2]
            click.echo(f"\n    {best[: _WIDTH - 7]}{'…' if len(best) > _WIDTH - 7 else ''}")
    click.echo(f"\n{'─' * _WIDTH}")
    click.echo(
        f"LangChain and LlamaIndex gave the same order each time. {num_pairs} pairs in {seconds:.1f} s: "
        f"{num_pairs / max(seconds, 1e-9):.0f} pairs/s."
    )
    if config.model == EMBEDDED_MODEL:
        click.echo("This is the small model that comes with the package, English only and no BGE model; with")
        click.echo("a hub or a local copy: bge-rerank demo --model BAAI/bge-reranker-base")


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
