"""Answer a question from your own files with LlamaIndex: LanceDB finds 50 chunks, the reranker keeps 5.

    python -m examples.llama_index_rag "How do I keep a GPU busy?" --folder ~/notes --compare

Needs no key and no network: the answer is a quote. With `--llm openai:gpt-4o-mini`, a
language model answers. Add `--llm-url` for a model on your own machine.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.node_parser import MarkdownNodeParser, SentenceSplitter
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.readers.base import BaseReader
from llama_index.core.response_synthesizers import BaseSynthesizer, get_response_synthesizer
from llama_index.core.schema import BaseNode, Document, NodeWithScore, QueryBundle, TextNode

from bge_rerank_integrations import SupportsRank
from bge_rerank_integrations.errors import ConfigError
from bge_rerank_integrations.llama_index import BGERerankPostprocessor
from examples.answer import find_quote, format_quote
from examples.folder import SourceFile, find_files, read_pages
from examples.store import Chunk, ChunkStore, FoundChunk
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

HEADING_PARSER = MarkdownNodeParser(header_path_separator="\n")
SENTENCE_SPLITTER = SentenceSplitter(chunk_size=256, chunk_overlap=32)  # tokens

# Each provider has its own package, llama-index-llms-<provider>.
LLM_CLASSES = {"anthropic": "Anthropic", "ollama": "Ollama", "openai": "OpenAI"}


class PageReader(BaseReader):
    """Reads a file: one document for each page of a PDF and each line of JSON, or one for the whole file."""

    def load_data(self, file: Path, extra_info: dict[str, Any] | None = None) -> list[Document]:
        """Return the documents. Raise `SkippedFileError` if the file cannot be read."""
        return [
            Document(
                text=page.text,
                metadata={
                    **(extra_info or {}),
                    "page": page.number,
                    "heading": page.heading,
                    "is_markdown": page.is_markdown,
                },
            )
            for page in read_pages(file)
        ]


class StoreRetriever(BaseRetriever):
    """The index as a LlamaIndex retriever."""

    def __init__(self, store: ChunkStore, num_candidates: int = NUM_CANDIDATES) -> None:
        self._store = store
        self._num_candidates = num_candidates
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._store.search(query_bundle.query_str, self._num_candidates)
        return [NodeWithScore(node=make_node(chunk), score=chunk.score) for chunk in found]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class QuoteSynthesizer(BaseSynthesizer):
    """Answers with the sentence that fits the question best, without a language model."""

    def __init__(self, scorer: SupportsRank) -> None:
        self._scorer = scorer
        # Without this, the base class would load the default language model of OpenAI.
        super().__init__(llm=MockLLM(), empty_response="Nothing found.")

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        **response_kwargs: Any,  # noqa: ARG002
    ) -> str:
        """Return the best sentence in the texts of the nodes, and the number of its node."""
        chunks = [chunk.partition("\n\n") for chunk in text_chunks]
        passages = [(source.partition(" > ")[2], text) for source, _, text in chunks]
        return format_quote(find_quote(self._scorer, query_str, passages))

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> str:
        """Do the same as `get_response` without blocking the event loop."""
        return await asyncio.to_thread(self.get_response, query_str, text_chunks, **response_kwargs)

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass


def split_file(file: SourceFile) -> Iterator[Chunk]:
    """Read a file and split it. Raise `SkippedFileError` if it cannot be read."""
    for document in PageReader().load_data(file.path):
        sections: Sequence[BaseNode] = [document]
        if document.metadata["is_markdown"]:
            sections = [move_heading(node) for node in HEADING_PARSER.get_nodes_from_documents([document])]
        for section in sections:
            for text in SENTENCE_SPLITTER.split_text(section.get_content()):
                if text:  # a heading may have no text below it
                    yield Chunk(text, section.metadata["heading"], section.metadata["page"])


def move_heading(section: BaseNode) -> TextNode:
    """Return a section of Markdown. Its metadata has its heading after the headings above it."""
    above = section.metadata["header_path"].strip("\n").split("\n")
    own = re.match(r"#+\s+(.*)\n?", text := section.get_content())
    path = [heading for heading in [*above, own[1] if own else ""] if heading]
    return TextNode(
        text=text[own.end() :] if own else text,
        metadata={"heading": " > ".join(path), "page": section.metadata["page"]},
    )


def make_node(chunk: FoundChunk) -> TextNode:
    """Return a chunk as a node. Rerankers read its heading and text; language models also read its source."""
    return TextNode(
        id_=chunk.id,
        text=chunk.text,
        metadata={
            "heading": chunk.heading,
            "source": make_label(chunk.file, chunk.page, chunk.heading),
        },
        metadata_template="{value}",
        excluded_embed_metadata_keys=["source"],
        excluded_llm_metadata_keys=["heading"],
    )


def make_engine(
    store: ChunkStore, reranker: BGERerankPostprocessor, synthesizer: BaseSynthesizer
) -> RetrieverQueryEngine:
    """Return an engine that finds chunks, reranks them and answers from them."""
    return RetrieverQueryEngine(
        retriever=StoreRetriever(store), node_postprocessors=[reranker], response_synthesizer=synthesizer
    )


def make_reranker(model: str, top_n: int) -> BGERerankPostprocessor:
    """Return a reranker. It reads the heading of a node by default."""
    return BGERerankPostprocessor(model=model, top_n=top_n, keep_retrieval_score=True)


def load_llm(name: str, url: str | None) -> LLM:
    """Return the language model called `provider:name`, from a server of your own if there is a URL.

    Raises:
        ConfigError: The provider is unknown, or its package is not installed.
    """
    provider, _, model = name.partition(":")
    if provider not in LLM_CLASSES or not model:
        raise ConfigError(f"--llm must be provider:name, with a provider of {', '.join(LLM_CLASSES)}")
    # LlamaIndex's `OpenAI` accepts only the names of models of OpenAI.
    module, class_name = (provider, LLM_CLASSES[provider]) if url is None else ("openai_like", "OpenAILike")
    options: dict[str, Any] = {}
    if url is not None:
        # A local server needs no key, but the client requires one.
        key = os.environ.get("OPENAI_API_KEY", "none")
        options = {"api_base": url, "api_key": key, "is_chat_model": True, "is_function_calling_model": True}
    try:
        llm_class = getattr(importlib.import_module(f"llama_index.llms.{module}"), class_name)
    except ImportError as error:
        package = f"llama-index-llms-{module.replace('_', '-')}"
        raise ConfigError(f"--llm {name} needs a package: pip install {package}") from error
    llm: LLM = llm_class(model=model, **options)
    return llm


def as_sources(nodes: list[NodeWithScore]) -> list[Source]:
    """Return nodes as lines to print."""
    ranks = [node.metadata.get("retrieval_rank") for node in nodes]
    return [
        Source(node.metadata["source"], node.get_score(), None if rank is None else rank + 1)
        for node, rank in zip(nodes, ranks, strict=True)
    ]


def main() -> None:
    """Run the app."""
    args = make_rag_parser(__doc__ or "").parse_args()
    stages = Stages()
    with errors_end_the_program():
        with llm_errors_end_the_program():
            llm = None if args.llm is None else load_llm(args.llm, args.llm_url)
        files = find_files(args.folder)
        with stages.measure("index"):
            store = open_store(args, "llama_index")
            report_update(store.update(files, split_file, progress=True), store)
        reranker = make_reranker(args.model, args.top_n)
        with stages.measure("load"):
            scorer = load_scorer(reranker)
        synthesizer = QuoteSynthesizer(scorer) if llm is None else get_response_synthesizer(llm=llm)
        engine = make_engine(store, reranker, synthesizer)

        # `engine.query(question)` runs all stages. Here they run separately, to time each.
        question = QueryBundle(args.question)
        with stages.measure("retrieve"):
            found = engine.retriever.retrieve(question)
        with stages.measure("rerank"):
            kept = reranker.postprocess_nodes(found, question)
        print(f"\nQuestion: {args.question}")
        if args.compare:
            plain = found[: args.top_n]
            with llm_errors_end_the_program():
                print(f"\nAnswer without the reranker: {engine.synthesize(question, plain)}")
            print_sources(f"First {len(plain)} of {len(found)} found", as_sources(plain))
        with stages.measure("answer"), llm_errors_end_the_program():
            text = str(engine.synthesize(question, kept))
        print(f"\nAnswer: {text}")
        print_sources(f"Best {len(kept)} of {len(found)}, reranked", as_sources(kept))
        stages.print()


if __name__ == "__main__":
    main()
