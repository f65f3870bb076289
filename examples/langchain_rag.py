"""Answer a question from your own files with LangChain: LanceDB finds 50 chunks, `BGEReranker` keeps 5.

    python -m examples.langchain_rag "How do I keep a GPU busy?" --folder ~/notes --compare

Needs no key and no network: the answer is a quote. With `--llm openai:gpt-4o-mini`, a
language model answers. Add `--llm-url` for a model on your own machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from langchain.chat_models import init_chat_model
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_text_splitters import Language, RecursiveCharacterTextSplitter

from bge_rerank_integrations.langchain import BGEReranker
from examples.answer import find_quote, format_quote
from examples.folder import SourceFile, find_files, read_pages, split_sections
from examples.store import Chunk, ChunkStore
from examples.terminal import (
    NUM_CANDIDATES,
    Source,
    Stages,
    errors_end_the_program,
    llm_errors_end_the_program,
    load_scorer,
    make_label,
    make_rag_parser,
    open_store,
    print_sources,
    report_update,
)

# Number of characters. They are about 200 tokens of English or 500 of Chinese, which fit into a reranker.
CHUNK_SIZE, CHUNK_OVERLAP = 800, 100
MARKDOWN_SPLITTER = RecursiveCharacterTextSplitter.from_language(
    Language.MARKDOWN, chunk_size=CHUNK_SIZE, chunk_overlap=CHUNK_OVERLAP
)
TEXT_SPLITTER = RecursiveCharacterTextSplitter(
    separators=["\n\n", "\n", "。", "！", "？", ". ", " ", ""],
    keep_separator="end",
    chunk_size=CHUNK_SIZE,
    chunk_overlap=CHUNK_OVERLAP,
)

PROMPT = ChatPromptTemplate.from_messages(
    [
        (
            "system",
            "Answer the question from the passages alone. After each statement give the number of the "
            "passage it comes from, as [1]. If the passages do not hold the answer, say so.\n\n{passages}",
        ),
        ("human", "{question}"),
    ]
)


class FileLoader(BaseLoader):
    """Loads a file: one document for each page of a PDF, line of JSON or section of Markdown or HTML."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def lazy_load(self) -> Iterator[Document]:
        """Yield the documents. Raise `SkippedFileError` if the file cannot be read."""
        for page in read_pages(self._file.path):
            # LangChain's MarkdownHeaderTextSplitter would remove the indentation of code.
            sections = split_sections(page.text) if page.is_markdown else [(page.heading, page.text)]
            for heading, text in sections:
                yield Document(
                    text,
                    metadata={"heading": heading, "page": page.number, "is_markdown": page.is_markdown},
                )


class StoreRetriever(BaseRetriever):
    """The index as a LangChain retriever."""

    store: ChunkStore
    num_candidates: int = NUM_CANDIDATES

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        return [
            Document(
                id=chunk.id,
                page_content=chunk.text,
                metadata={
                    "source": make_label(chunk.file, chunk.page, chunk.heading),
                    "heading": chunk.heading,
                    "score": chunk.score,
                },
            )
            for chunk in self.store.search(query, self.num_candidates)
        ]


def split_file(file: SourceFile) -> Iterator[Chunk]:
    """Load a file and split it. Raise `SkippedFileError` if it cannot be read."""
    for document in FileLoader(file).lazy_load():
        splitter = MARKDOWN_SPLITTER if document.metadata["is_markdown"] else TEXT_SPLITTER
        for part in splitter.split_documents([document]):
            yield Chunk(part.page_content, part.metadata["heading"], part.metadata["page"])


def make_reranker(model: str, top_n: int) -> BGEReranker:
    """Return a reranker that reads a chunk's heading above its text."""
    return BGEReranker(
        model=model, top_n=top_n, document_template="{heading}\n\n{page_content}", keep_retrieval_score=True
    )


def make_retriever(store: ChunkStore, reranker: BGEReranker) -> ContextualCompressionRetriever:
    """Return a retriever that finds chunks and reranks them."""
    return ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=StoreRetriever(store=store)
    )


def load_llm(name: str, url: str | None) -> BaseChatModel:
    """Return the chat model called `provider:name`, from a server of your own if there is a URL."""
    # A local server needs no key, but the client requires one.
    key = os.environ.get("OPENAI_API_KEY", "none")
    return init_chat_model(name) if url is None else init_chat_model(name, base_url=url, api_key=key)


def format_passages(documents: list[Document]) -> str:
    """Return documents as numbered text for a language model."""
    return "\n\n".join(
        f"[{number}] {document.metadata['source']}\n{document.page_content}"
        for number, document in enumerate(documents, start=1)
    )


def answer_with_llm(llm: BaseChatModel, question: str, documents: list[Document]) -> str:
    """Return the answer of a chat model that reads documents."""
    chain = PROMPT | llm | StrOutputParser()
    return chain.invoke({"question": question, "passages": format_passages(documents)})


def as_sources(documents: list[Document], score_key: str) -> list[Source]:
    """Return documents as lines to print."""
    return [_as_source(document.metadata, score_key) for document in documents]


def _as_source(metadata: dict[str, Any], score_key: str) -> Source:
    rank = metadata.get("retrieval_rank")
    return Source(metadata["source"], metadata[score_key], None if rank is None else rank + 1)


def main() -> None:
    """Run the app."""
    args = make_rag_parser(__doc__ or "").parse_args()
    stages = Stages()
    with errors_end_the_program():
        with llm_errors_end_the_program():
            llm = None if args.llm is None else load_llm(args.llm, args.llm_url)
        files = find_files(args.folder)
        with stages.measure("index"):
            store = open_store(args, "langchain")
            report_update(store.update(files, split_file, progress=True), store)
        reranker = make_reranker(args.model, args.top_n)
        with stages.measure("load"):
            scorer = load_scorer(reranker)
        retriever = make_retriever(store, reranker)

        def answer(documents: list[Document]) -> str:
            if llm is not None:
                with llm_errors_end_the_program():
                    return answer_with_llm(llm, args.question, documents)
            passages = [(d.metadata["heading"], d.page_content) for d in documents]
            return format_quote(find_quote(scorer, args.question, passages))

        # `retriever.invoke(question)` runs both stages. Here they run separately, to time each.
        with stages.measure("retrieve"):
            found = retriever.base_retriever.invoke(args.question)
        with stages.measure("rerank"):
            kept = list(reranker.compress_documents(found, args.question))
        print(f"\nQuestion: {args.question}")
        if args.compare:
            plain = found[: args.top_n]
            print(f"\nAnswer without the reranker: {answer(plain)}")
            print_sources(f"First {len(plain)} of {len(found)} found", as_sources(plain, "score"))
        with stages.measure("answer"):
            text = answer(kept)
        print(f"\nAnswer: {text}")
        print_sources(f"Best {len(kept)} of {len(found)}, reranked", as_sources(kept, "relevance_score"))
        stages.print()


if __name__ == "__main__":
    main()
