"""Answer a question with LlamaIndex: BM25, then `BGERerankPostprocessor`, then a quote from the best.

    python -m examples.llama_index_rag "How do snakes kill without venom?" --model BAAI/bge-reranker-base

Needs no key. A language model answers instead of the quote with, say, `--llm openai:gpt-4o-mini`.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer, get_response_synthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from bge_rerank_integrations.llama_index import BGERerankPostprocessor
from bge_rerank_integrations.scorer import SupportsRank
from examples.answer import (
    NUM_CANDIDATES,
    KeywordSearch,
    Passage,
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

# Each comes from a package of its own, llama-index-llms-<provider>.
LLM_CLASSES = {"anthropic": "Anthropic", "ollama": "Ollama", "openai": "OpenAI"}


class KeywordRetriever(BaseRetriever):
    """BM25 as a LlamaIndex retriever."""

    def __init__(self, search: KeywordSearch, num_candidates: int = NUM_CANDIDATES) -> None:
        self._search = search
        self._num_candidates = num_candidates
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._search.search(query_bundle.query_str, self._num_candidates)
        return [NodeWithScore(node=make_node(passage), score=score) for passage, score in found]


class QuoteSynthesizer(BaseSynthesizer):
    """Answers with the sentence that fits the question best; asks no language model."""

    def __init__(self, scorer: SupportsRank) -> None:
        self._scorer = scorer
        # Without a language model the base class would look for OpenAI's.
        super().__init__(llm=MockLLM(), empty_response="Nothing found.")

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        **response_kwargs: Any,  # noqa: ARG002
    ) -> str:
        """Return the best sentence of the nodes' texts and where it stands."""
        chunks = [chunk.partition("\n\n") for chunk in text_chunks]
        passages = [(title, text) for title, _, text in chunks]
        return format_quote(find_quote(self._scorer, query_str, passages))

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> str:
        """Return what `get_response` returns, off the event loop."""
        return await asyncio.to_thread(self.get_response, query_str, text_chunks, **response_kwargs)

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass


def make_node(passage: Passage) -> TextNode:
    """Return a passage as a node whose text, for rerankers and language models, begins with its title."""
    return TextNode(
        id_=passage.id, text=passage.text, metadata={"title": passage.title}, metadata_template="{value}"
    )


def make_reranker(model: str, top_n: int | None) -> BGERerankPostprocessor:
    """Return a reranker; it reads a node's title without being told to."""
    return BGERerankPostprocessor(model=model, top_n=top_n, keep_retrieval_score=True)


def load_llm(name: str) -> LLM:
    """Return the language model called `provider:name`."""
    provider, _, model = name.partition(":")
    if provider not in LLM_CLASSES or not model:
        sys.exit(f"error: --llm must be provider:name, with a provider of {', '.join(LLM_CLASSES)}")
    try:
        module = importlib.import_module(f"llama_index.llms.{provider}")
    except ImportError:
        sys.exit(f"error: --llm {name} needs a package: pip install llama-index-llms-{provider}")
    llm: LLM = getattr(module, LLM_CLASSES[provider])(model=model)
    return llm


def as_results(nodes: list[NodeWithScore]) -> list[Result]:
    """Return reranked nodes as lines to print."""
    return [
        Result(n.node.metadata["title"], n.get_score(), n.node.metadata["retrieval_rank"] + 1) for n in nodes
    ]


def main() -> None:
    """Run the app."""
    args = make_rag_parser(__doc__ or "").parse_args()
    llm = None if args.llm is None else load_llm(args.llm)
    with errors_end_the_program():
        first_stage = KeywordRetriever(KeywordSearch(read_corpus()))
        reranker = make_reranker(args.model, args.top_n)

        with Timer() as loading:
            scorer = load_scorer(reranker)
        engine = RetrieverQueryEngine(
            retriever=first_stage,
            node_postprocessors=[reranker],
            response_synthesizer=get_response_synthesizer(llm=llm) if llm else QuoteSynthesizer(scorer),
        )
        before = first_stage.retrieve(args.question)
        with Timer() as retrieving:
            after = engine.retrieve(QueryBundle(args.question))
        with Timer() as answering:
            answer = engine.synthesize(QueryBundle(args.question), after)

        print(f"\nQuestion: {args.question}")
        shown = [Result(n.node.metadata["title"], n.get_score()) for n in before[: args.top_n]]
        print_results(f"Before: BM25, {len(shown)} of {len(before)}", shown)
        print_results(f"After: BGERerankPostprocessor, {len(after)} of {len(before)}", as_results(after))
        print(f"\nAnswer: {answer}\n")
        print(
            f"Loading the model took {loading.elapsed_ms:.0f} ms, retrieval and reranking "
            f"{retrieving.elapsed_ms:.0f} ms, the answer {answering.elapsed_ms:.0f} ms."
        )


if __name__ == "__main__":
    main()
