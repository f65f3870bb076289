"""The types of the calls in the README and the documentation.

mypy and pyright check this file in strict mode. The tests run the calls that need no model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore
from typing_extensions import assert_type

from bge_rerank_integrations import (
    BGEReranker,
    BGERerankPostprocessor,
    RankedPassage,
    Ranking,
    Scorer,
    ScorerConfig,
    SupportsRank,
)


def test_a_config_accepts_several_types_and_stores_one() -> None:
    config = ScorerConfig(
        model=Path("models") / "base",
        cache_folder=Path("cache"),
        devices=["cuda:0", "cuda:1"],
        dtype="float16",
    )
    assert_type(config.model, str)
    assert_type(config.cache_folder, str | None)
    assert_type(config.devices, tuple[str, ...] | None)
    same = ScorerConfig(
        model=str(Path("models") / "base"),
        cache_folder="cache",
        devices=("cuda:0", "cuda:1"),
        dtype="float16",
    )
    assert config == same


def test_a_reranker_accepts_the_documented_types() -> None:
    for reranker in (
        BGEReranker(model="BAAI/bge-reranker-base", top_n=5),
        BGEReranker(model=Path("models") / "base", cache_folder=Path("cache"), devices=["cuda:0", "cuda:1"]),
        BGEReranker(rank_fields=["title"], score_threshold=0.5, timeout=2),
        BGEReranker(rank_fields=("title", "year"), max_wait_ms=1),
        BGEReranker(document_template="{title}\n{page_content}", normalize=False),
    ):
        assert isinstance(reranker.model_copy(update={"top_n": 3}), BGEReranker)


def test_a_postprocessor_accepts_the_documented_types() -> None:
    for postprocessor in (
        BGERerankPostprocessor(model="BAAI/bge-reranker-base", top_n=5),
        BGERerankPostprocessor(model=Path("models") / "base", devices=["cuda:0", "cuda:1"], timeout=0.5),
        BGERerankPostprocessor(metadata_mode=MetadataMode.NONE, cache_folder=Path("cache")),
    ):
        assert isinstance(postprocessor.model_copy(update={"top_n": 3}), BGERerankPostprocessor)


def test_an_object_with_rank_and_arank_is_a_scorer() -> None:
    class Own:
        def rank(
            self,
            query: str,
            passages: Sequence[str],
            top_n: int | None = None,
            threshold: float | None = None,
        ) -> list[RankedPassage]:
            return []

        async def arank(
            self,
            query: str,
            passages: Sequence[str],
            top_n: int | None = None,
            threshold: float | None = None,
        ) -> list[RankedPassage]:
            return []

    scorer: SupportsRank = Own()
    assert BGEReranker(scorer=Own()).scorer_name() == BGERerankPostprocessor(scorer=scorer).scorer_name()


def calls_of_the_readme(
    pairs: Iterator[tuple[str, str]], passages: list[str], base: Callable[[str], list[Document]]
) -> None:
    """This function is type-checked but not called, because it would load a model."""
    scorer = Scorer(
        Path("models") / "base",
        cache_folder=Path("cache"),
        device="cuda:1",
        dtype="float16",
        query_max_length=256,
    )
    Scorer("BAAI/bge-reranker-base", devices=["cuda:0", "cuda:1"])
    assert_type(scorer.score([("I am happy to help", "Assisting you is my pleasure")]), list[float])
    assert_type(scorer.score(pairs), list[float])
    assert_type(scorer.compute_score(("a", "b")), list[float])
    assert_type(scorer.rank("what is a panda?", passages, top_n=3), Ranking)
    assert_type(scorer.rank("what is a panda?", passages, timeout=1, normalize=True), Ranking)
    assert_type(scorer.rank_many([("first query", passages), ("second query", passages)]), list[Ranking])
    assert_type(scorer.config.model, str)

    reranker = BGEReranker(scorer=scorer, top_n=5)
    documents = reranker.compress_documents(
        base("what does a giant panda eat?"), "what does a giant panda eat?"
    )
    assert_type(documents, list[Document])
    results = reranker.rerank(["A bear.", {"text": "Bamboo"}, documents[0]], "what?", rank_fields=["text"])
    assert_type(results, list[dict[str, Any]])
    reranker.rerank_many([("first query", passages), ("second query", documents)])
    reranker.warmup()
    reranker.close()

    postprocessor = BGERerankPostprocessor(scorer=scorer, top_n=5)
    nodes: list[NodeWithScore] = []
    assert_type(postprocessor.postprocess_nodes(nodes, query_str="what?"), list[NodeWithScore])
    postprocessor.warmup()
    postprocessor.close()


async def asynchronous_calls_of_the_readme(
    pairs: AsyncIterator[tuple[str, str]], passages: list[str], documents: list[Document]
) -> None:
    """This function is type-checked but not called, because it would load a model."""
    scorer = Scorer(model="embedded")
    assert_type(await scorer.ascore(pairs), list[float])
    assert_type(await scorer.ascore(("query", passage) for passage in passages), list[float])
    assert_type(await scorer.arank("what is a panda?", passages), Ranking)
    assert_type(await scorer.arank_many([("what is a panda?", passages)]), list[Ranking])
    reranker = BGEReranker(scorer=scorer)
    await reranker.awarmup()
    assert_type(await reranker.acompress_documents(documents, "what?"), list[Document])
    await reranker.arerank_many([("what?", passages)])
