"""Answer a question with LangChain: BM25 finds 20 passages, `BGEReranker` picks the best, one is quoted.

    python -m examples.langchain_rag "How did the jaguar cars get their name?" --model BAAI/bge-reranker-base

Needs no key. A language model answers instead of the quote with, say, `--llm openai:gpt-4o-mini`.
"""

from __future__ import annotations

import sys

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever

from bge_rerank_integrations.langchain import BGEReranker
from examples.answer import (
    NUM_CANDIDATES,
    KeywordSearch,
    Result,
    Timer,
    errors_end_the_program,
    find_quote,
    format_quote,
    load_scorer,
    make_rag_parser,
    print_results,
    read_corpus,
)

PROMPT = ChatPromptTemplate.from_messages(
    [
        (
            "system",
            "Answer the question from the passages alone and name the titles you used. If they do not "
            "hold the answer, say so.\n\n{passages}",
        ),
        ("human", "{question}"),
    ]
)


class KeywordRetriever(BaseRetriever):
    """BM25 as a LangChain retriever."""

    search: KeywordSearch
    num_candidates: int = NUM_CANDIDATES

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        return [
            Document(
                id=passage.id, page_content=passage.text, metadata={"title": passage.title, "score": score}
            )
            for passage, score in self.search.search(query, self.num_candidates)
        ]


def make_reranker(model: str, top_n: int | None) -> BGEReranker:
    """Return a reranker that reads a passage with its title above it."""
    return BGEReranker(
        model=model, top_n=top_n, document_template="{title}\n\n{page_content}", keep_retrieval_score=True
    )


def answer_with_llm(llm: BaseChatModel, question: str, documents: list[Document]) -> str:
    """Let a chat model answer from documents."""
    passages = "\n\n".join(f"# {d.metadata['title']}\n{d.page_content}" for d in documents)
    chain = PROMPT | llm | StrOutputParser()
    return chain.invoke({"question": question, "passages": passages})


def load_llm(name: str) -> BaseChatModel:
    """Return the chat model called `provider:name`."""
    try:
        from langchain.chat_models import init_chat_model  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        sys.exit("error: --llm needs the langchain package: pip install langchain")
    try:
        llm: BaseChatModel = init_chat_model(name)
    except (ImportError, ValueError) as error:  # a missing provider package or an unknown provider
        sys.exit(f"error: {error}")
    return llm


def as_results(documents: list[Document]) -> list[Result]:
    """Return reranked documents as lines to print."""
    return [
        Result(d.metadata["title"], d.metadata["relevance_score"], d.metadata["retrieval_rank"] + 1)
        for d in documents
    ]


def main() -> None:
    """Run the app."""
    args = make_rag_parser(__doc__ or "").parse_args()
    llm = None if args.llm is None else load_llm(args.llm)
    with errors_end_the_program():
        first_stage = KeywordRetriever(search=KeywordSearch(read_corpus()))
        reranker = make_reranker(args.model, args.top_n)
        retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=first_stage)

        with Timer() as loading:
            scorer = load_scorer(reranker)
        before = first_stage.invoke(args.question)
        with Timer() as retrieving:
            after = retriever.invoke(args.question)
        with Timer() as answering:
            if llm is None:
                passages = [(d.metadata["title"], d.page_content) for d in after]
                answer = format_quote(find_quote(scorer, args.question, passages))
            else:
                answer = answer_with_llm(llm, args.question, after)

        print(f"\nQuestion: {args.question}")
        shown = [Result(d.metadata["title"], d.metadata["score"]) for d in before[: args.top_n]]
        print_results(f"Before: BM25, {len(shown)} of {len(before)}", shown)
        print_results(f"After: BGEReranker, {len(after)} of {len(before)}", as_results(after))
        print(f"\nAnswer: {answer}\n")
        print(
            f"Loading the model took {loading.elapsed_ms:.0f} ms, retrieval and reranking "
            f"{retrieving.elapsed_ms:.0f} ms, the answer {answering.elapsed_ms:.0f} ms."
        )


if __name__ == "__main__":
    main()
