"""`bge-rerank demo`: searches the standard library's documentation with BM25 and reranks the results."""

from __future__ import annotations

import time

import click

from bge_rerank_integrations.cli.console import WIDTH, cut, require_stdout, wrap
from bge_rerank_integrations.cli.options import config_options
from bge_rerank_integrations.cli.stdlib_docs import QUESTIONS, read_stdlib_docs
from bge_rerank_integrations.cli.summary import describe_truncation
from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.errors import MissingExtraError, RerankError, missing_extra
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.scorer import Scorer

_NAME_WIDTH = 29
_RULE = "-" * WIDTH


@click.command()
@click.argument("questions", nargs=-1, metavar="[QUESTION]...")
@click.option(
    "--top-n", type=click.IntRange(min=1), default=3, show_default=True, help="Passages to show per question."
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Passages to rerank per question.",
)
@config_options(default_model=EMBEDDED_MODEL)
def demo(config: ScorerConfig, questions: tuple[str, ...], top_n: int, depth: int) -> None:
    """Show how reranking changes search results.

    The demo searches the documentation of the installed Python's standard library
    with BM25, then reranks the passages found, once through LangChain and once
    through LlamaIndex. If you give no QUESTION, it asks ten questions of its own.

    \b
    bge-rerank demo
    bge-rerank demo "run a function later in another thread"
    """
    require_stdout()
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
        click.echo(f"{len(docs)} passages: the documentation of Python's standard library.")
        click.echo(wrap(f"Model: {config.model}"))
        langchain = BGEReranker(scorer=scorer, top_n=top_n, keep_retrieval_score=True)
        llama_index = BGERerankPostprocessor(scorer=scorer, top_n=top_n, keep_retrieval_score=True)
        scorer.warmup()
        num_pairs, num_truncated, num_truncated_queries, seconds = 0, 0, 0, 0.0
        for question in questions or QUESTIONS:
            found = search.search({"": question}, depth)[""]
            documents = [Document(id=name, page_content=docs[name]) for name in found]
            nodes = [
                NodeWithScore(node=TextNode(id_=name, text=docs[name]), score=found[name]) for name in found
            ]
            before_stats = scorer.stats()
            started = time.perf_counter()
            after = langchain.compress_documents(documents, question)
            seconds += time.perf_counter() - started
            num_truncated += scorer.stats().truncations - before_stats.truncations
            num_truncated_queries += scorer.stats().query_truncations - before_stats.query_truncations
            num_pairs += len(documents)
            nodes_after = llama_index.postprocess_nodes(nodes, query_str=question)
            if [document.id for document in after] != [node.node.node_id for node in nodes_after]:
                raise RerankError(
                    "LangChain and LlamaIndex returned different orders; please report this bug"
                )
            click.echo(f"\n{_RULE}\n{cut(question, WIDTH)}\n")
            if not found:
                click.echo("No passage shares a word with this question.")
                continue
            click.echo(
                f"    {'BM25, before':{_NAME_WIDTH}}  {'reranked, after':{_NAME_WIDTH}}{'was':>5}{'score':>8}"
            )
            for rank, (before, document) in enumerate(zip(found, after, strict=False), start=1):
                was = f"#{document.metadata['retrieval_rank'] + 1}"
                names = (cut(name, _NAME_WIDTH) for name in (before, str(document.id)))
                click.echo(
                    f"{rank:>3} {'  '.join(f'{name:{_NAME_WIDTH}}' for name in names)}{was:>5}"
                    f"{document.metadata['relevance_score']:8.2f}"
                )
            best = after[0].page_content.partition(": ")[2]
            click.echo(f"\n    {cut(best, WIDTH - 4)}")
    click.echo(f"\n{_RULE}")
    click.echo("LangChain and LlamaIndex returned the same order for every question.")
    click.echo(f"{num_pairs} pairs in {seconds:.1f} s: {num_pairs / max(seconds, 1e-9):.0f} pairs/s.")
    if cut_off := describe_truncation(num_truncated, num_truncated_queries, config):
        click.echo(wrap(cut_off))
    if config.model == EMBEDDED_MODEL:
        click.echo(
            wrap(
                "The demo ran the small English model that comes with the package. It is not a BGE model. To "
                "run one from the hub: `bge-rerank demo --model BAAI/bge-reranker-base`"
            )
        )
