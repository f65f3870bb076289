"""Rerank passages of the example corpus through LangChain and LlamaIndex, before and after.

    python -m examples.demo [--model BAAI/bge-reranker-base] [QUESTION]

Ends with an error if the two frameworks do not give the same order.
"""

from __future__ import annotations

import sys
from textwrap import fill

from bge_rerank_integrations.langchain import BGEReranker
from bge_rerank_integrations.llama_index import BGERerankPostprocessor
from examples import langchain_rag, llama_index_rag
from examples.answer import (
    NUM_CANDIDATES,
    KeywordSearch,
    Timer,
    load_scorer,
    make_parser,
    open_model,
    pad,
    read_corpus,
)

# BM25 puts first a passage that shares words with each and does not answer it; one further down does.
QUESTIONS = [
    "Which snake kills without venom?",
    "What did the first person on the Moon bring back?",
    "植物在夜里也需要氧气吗？",
]
WIDTH = 100
RULE = "─" * WIDTH
HEADER = f"      {'BM25, before':25}   score      {'reranked, after':25} was  LangChain  LlamaIndex"


def compare(
    question: str,
    search: KeywordSearch,
    langchain_reranker: BGEReranker,
    llama_index_reranker: BGERerankPostprocessor,
    num_rows: int,
) -> bool:
    """Rerank a question's candidates through both frameworks, print a table of the best.

    Returns:
        Whether both gave the same order.
    """
    with Timer() as searching:
        documents = langchain_rag.KeywordRetriever(search=search).invoke(question)
    nodes = llama_index_rag.KeywordRetriever(search).retrieve(question)
    print(f"\n{RULE}\n{fill(f'Question: {question}', WIDTH)}")
    if not documents:
        print("No passage of the corpus shares a word with it.")
        return True

    with Timer() as langchain_time:
        documents_after = langchain_reranker.compress_documents(documents, question)
    with Timer() as llama_index_time:
        nodes_after = llama_index_reranker.postprocess_nodes(nodes, query_str=question)

    print(f"\n{HEADER}")
    rows = zip(documents, documents_after, nodes_after, strict=True)
    for rank, (before, after, node) in enumerate(list(rows)[:num_rows], start=1):
        was = f"#{after.metadata['retrieval_rank'] + 1}"
        print(
            f"  {rank:>2}  {pad(before.metadata['title'], 25)} {before.metadata['score']:>7.3f}"
            f"  {rank:>2}  {pad(after.metadata['title'], 25)} {was:>3}"
            f"  {after.metadata['relevance_score']:>9.6f}  {node.get_score():>10.6f}"
        )
    print(
        f"\n  {len(documents)} candidates: BM25 {searching.elapsed_ms:.1f} ms, reranking through LangChain "
        f"{langchain_time.elapsed_ms:.1f} ms, LlamaIndex {llama_index_time.elapsed_ms:.1f} ms"
    )
    same_order = [d.id for d in documents_after] == [n.node.node_id for n in nodes_after]
    difference = max(
        abs(d.metadata["relevance_score"] - n.get_score())
        for d, n in zip(documents_after, nodes_after, strict=True)
    )
    verdict = "the same order" if same_order else "DIFFERENT ORDERS"
    print(f"  Both frameworks give {verdict}; largest difference of scores {difference:.1g}")
    return same_order


def main() -> None:
    """Run the demo."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("question", nargs="?", help="default: three that BM25 gets wrong")
    args = parser.parse_args()
    search = KeywordSearch(read_corpus())
    with open_model(args.model) as model:
        langchain_reranker = langchain_rag.make_reranker(model, NUM_CANDIDATES)
        llama_index_reranker = llama_index_rag.make_reranker(model, NUM_CANDIDATES)
        with Timer() as loading:
            scorer = load_scorer(langchain_reranker)
        print(f"\n{scorer!r}, loaded in {loading.elapsed_ms:.0f} ms, used by both frameworks")
        same_order = [
            compare(question, search, langchain_reranker, llama_index_reranker, args.top_n)
            for question in ([args.question] if args.question else QUESTIONS)
        ]
        print(f"\n{RULE}")
    if not all(same_order):
        sys.exit("error: the frameworks' orders differ")


if __name__ == "__main__":
    main()
