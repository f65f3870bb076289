"""`BGEReranker` in LangChain: returned documents, scored texts, callbacks, and use in other components."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import sys
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import numpy as np
import pytest
import torch
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_core.callbacks import (
    AsyncCallbackManager,
    BaseCallbackHandler,
    CallbackManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.schema import StreamEvent
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.tracers.schemas import Run
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ConfigDict, ValidationError
from tokenizers import Tokenizer

from bge_rerank_integrations import BGEReranker, RankedPassage, Ranking, Scorer
from bge_rerank_integrations.errors import ConfigError, InputError, InputTypeError, NonFiniteScoreError
from bge_rerank_integrations.protocols import PackageScorer
from tests.support.scorers import BEAR, BEST_FIRST, PANDA, TEA, BrokenScorer, StuckScorer, TableScorer
from tests.support.tolerances import LOGIT_TOLERANCE

QUERY = "QUERY-CANARY what does a panda eat?"
TOLERANCE = LOGIT_TOLERANCE[torch.float32]


class Section(Document):
    """A user-defined document type."""

    section: int = 0


class FixedRetriever(BaseRetriever):
    """Returns the same `k` documents for every query."""

    documents: list[Document]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return self.documents[:k]


class FirstWords(BaseDocumentTransformer):
    """A document transformer that keeps the first two words."""

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        return [Document(page_content=" ".join(d.page_content.split()[:2])) for d in documents]


@dataclass
class Event:
    """One call of a callback handler."""

    kind: str
    run_id: UUID
    parent_run_id: UUID | None
    name: str | None
    data: Any
    everything: str


class EventRecorder(BaseCallbackHandler):
    """A callback handler that records all events of chains and retrievers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def _keep(self, kind: str, data: Any, **kwargs: Any) -> None:
        self.events.append(
            Event(
                kind,
                kwargs["run_id"],
                kwargs.get("parent_run_id"),
                kwargs.get("name"),
                data,
                f"{data!r} {kwargs!r}",
            )
        )

    def on_chain_start(self, serialized: dict[str, Any], inputs: dict[str, Any], **kwargs: Any) -> None:
        self._keep("start", inputs, serialized=serialized, **kwargs)

    def on_chain_end(self, outputs: dict[str, Any], **kwargs: Any) -> None:
        self._keep("end", outputs, **kwargs)

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self._keep("error", error, **kwargs)

    def of_reranker(self) -> list[Event]:
        """Return the events of the only reranker run."""
        (run_id,) = {event.run_id for event in self.events if event.name == "BGEReranker"}
        return [event for event in self.events if event.run_id == run_id]


class Compress(Protocol):
    def __call__(
        self, reranker: BGEReranker, documents: Sequence[Document], query: str = ..., callbacks: Any = ...
    ) -> Awaitable[list[Document]]: ...


class Rerank(Protocol):
    def __call__(
        self, reranker: BGEReranker, documents: Any, query: Any = ..., **options: Any
    ) -> Awaitable[list[dict[str, Any]]]: ...


class RerankMany(Protocol):
    def __call__(
        self, reranker: BGEReranker, requests: Any, **options: Any
    ) -> Awaitable[list[list[dict[str, Any]]]]: ...


class Invoke(Protocol):
    def __call__(self, chain: Runnable[Any, Any], config: RunnableConfig) -> Awaitable[Any]: ...


@pytest.fixture(params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    """Run a test with the sync and with the async methods."""
    return str(request.param)


@pytest.fixture
def compress(mode: str) -> Compress:
    """Return `compress_documents` or `acompress_documents`."""

    async def run(
        reranker: BGEReranker, documents: Sequence[Document], query: str = QUERY, callbacks: Any = None
    ) -> list[Document]:
        if mode == "sync":
            return reranker.compress_documents(documents, query, callbacks)
        return await reranker.acompress_documents(documents, query, callbacks)

    return run


@pytest.fixture
def rerank(mode: str) -> Rerank:
    """Return `rerank` or `arerank`."""

    async def run(
        reranker: BGEReranker, documents: Any, query: Any = QUERY, **options: Any
    ) -> list[dict[str, Any]]:
        if mode == "sync":
            return reranker.rerank(documents, query, **options)
        return await reranker.arerank(documents, query, **options)

    return run


def skip_without_task_contexts() -> None:
    """Skip on Python versions where LangChain does not pass callbacks on to another task or thread."""
    if sys.version_info < (3, 11):
        pytest.skip("needs asyncio tasks that take a context, which Python has since 3.11")


@pytest.fixture
def rerank_many(mode: str) -> RerankMany:
    """Return `rerank_many` or `arerank_many`."""

    async def run(reranker: BGEReranker, requests: Any, **options: Any) -> list[list[dict[str, Any]]]:
        if mode == "sync":
            return reranker.rerank_many(requests, **options)
        return await reranker.arerank_many(requests, **options)

    return run


@pytest.fixture
def invoke(mode: str) -> Invoke:
    """Return `invoke` or `ainvoke` of a chain."""

    async def run(chain: Runnable[Any, Any], config: RunnableConfig) -> Any:
        return chain.invoke(QUERY, config) if mode == "sync" else await chain.ainvoke(QUERY, config)

    return run


@pytest.fixture
def reranker(checkpoint: Path) -> BGEReranker:
    """Return a reranker with the shared scorer of the small checkpoint, already loaded."""
    reranker = BGEReranker(model=str(checkpoint), device="cpu", dtype="float32")
    reranker.resolve_scorer()
    return reranker


def documents(texts: Sequence[str] = (TEA, PANDA, BEAR)) -> list[Document]:
    """Return documents with ids and nested metadata. They are not in the order of their scores."""
    return [
        Document(
            id=f"id-{index}",
            page_content=text,
            metadata={"title": f"title {index}", "secret": "METADATA-CANARY", "nested": {"tags": [index]}},
        )
        for index, text in enumerate(texts)
    ]


def contents(documents: Sequence[Document]) -> list[str]:
    return [document.page_content for document in documents]


def compression(reranker: BGEReranker) -> ContextualCompressionRetriever:
    return ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=FixedRetriever(documents=documents())
    )


# --- what is returned --------------------------------------------------------------------------------


async def test_documents_come_back_best_first_with_their_score(compress: Compress) -> None:
    returned = await compress(BGEReranker(scorer=TableScorer()), documents())
    assert [(d.page_content, d.metadata["relevance_score"]) for d in returned] == [
        (PANDA, 0.9),
        (BEAR, 0.5),
        (TEA, 0.1),
    ]


async def test_copies_keep_id_class_fields_and_metadata(compress: Compress) -> None:
    sections = [
        Section(id=f"id-{i}", page_content=text, section=i, metadata={"page": i, "nested": {"tags": [i]}})
        for i, text in enumerate((TEA, PANDA, BEAR))
    ]
    returned = await compress(BGEReranker(scorer=TableScorer()), sections)
    assert [type(document) for document in returned] == [Section] * 3
    assert [document.id for document in returned] == ["id-1", "id-2", "id-0"]
    assert [d.section for d in returned if isinstance(d, Section)] == [1, 2, 0]
    assert returned[0].metadata == {"page": 1, "nested": {"tags": [1]}, "relevance_score": 0.9}
    assert not any(copied is original for copied in returned for original in sections)


async def test_documents_of_the_caller_do_not_change(compress: Compress) -> None:
    given = documents()
    before = copy.deepcopy(given)
    metadata = [document.metadata for document in given]
    returned = await compress(BGEReranker(scorer=TableScorer(), keep_retrieval_score=True), given)
    for document in returned:
        document.metadata["mine"] = document.page_content = "changed afterwards"
    assert given == before
    assert all(document.metadata is same for document, same in zip(given, metadata, strict=True))


async def test_scores_are_python_floats(compress: Compress, reranker: BGEReranker) -> None:
    returned = await compress(reranker, documents())
    assert [type(document.metadata["relevance_score"]) for document in returned] == [float] * 3
    json.dumps([document.metadata for document in returned])


async def test_score_key_is_configurable(compress: Compress) -> None:
    returned = await compress(BGEReranker(scorer=TableScorer(), score_key="bge"), documents())
    assert [document.metadata["bge"] for document in returned] == [0.9, 0.5, 0.1]
    assert not any("relevance_score" in document.metadata for document in returned)


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ({"score": 0.25}, {"retrieval_score": 0.25}),
        ({"relevance_score": 0.75}, {"retrieval_score": 0.75}),
        ({"relevance_score": 0.75, "score": 0.25}, {"retrieval_score": 0.75}),
        ({"score": 0}, {"retrieval_score": 0}),
        ({}, {}),
    ],
)
async def test_retrieval_score_and_rank_are_kept_on_request(
    compress: Compress, metadata: dict[str, Any], kept: dict[str, Any]
) -> None:
    given = [Document(page_content=text, metadata=dict(metadata)) for text in (TEA, PANDA, BEAR)]
    returned = await compress(BGEReranker(scorer=TableScorer(), keep_retrieval_score=True), given)
    assert [document.metadata["retrieval_rank"] for document in returned] == [1, 2, 0]
    assert [document.metadata["relevance_score"] for document in returned] == [0.9, 0.5, 0.1]
    assert all(
        {key: value for key, value in document.metadata.items() if key == "retrieval_score"} == kept
        for document in returned
    )


async def test_retrieval_score_is_not_kept_unasked(compress: Compress) -> None:
    given = [Document(page_content=PANDA, metadata={"score": 0.25})]
    (returned,) = await compress(BGEReranker(scorer=TableScorer()), given)
    assert returned.metadata == {"score": 0.25, "relevance_score": 0.9}


async def test_equal_scores_keep_retrieval_order(compress: Compress) -> None:
    given = [Document(page_content="same", metadata={"at": index}) for index in range(20)]
    returned = await compress(BGEReranker(scorer=TableScorer()), given)
    assert [document.metadata["at"] for document in returned] == list(range(20))


@pytest.mark.parametrize(("top_n", "expected"), [(None, 3), (0, 0), (1, 1), (2, 2), (10, 3)])
async def test_top_n(compress: Compress, top_n: int | None, expected: int) -> None:
    returned = await compress(BGEReranker(scorer=TableScorer(), top_n=top_n), documents())
    assert contents(returned) == BEST_FIRST[:expected]


@pytest.mark.parametrize("top_n", [-1, True, 2.0, "2"])
def test_top_n_must_be_a_non_negative_integer(top_n: Any) -> None:
    with pytest.raises(ValidationError, match="top_n"):
        BGEReranker(top_n=top_n)


@pytest.mark.parametrize(
    ("threshold", "top_n", "expected"),
    [(None, None, 3), (0.5, None, 2), (0.5000001, None, 1), (0.1, 2, 2), (0.95, None, 0), (-1.0, 0, 0)],
)
async def test_threshold_is_inclusive(
    compress: Compress, threshold: float | None, top_n: int | None, expected: int
) -> None:
    reranker = BGEReranker(scorer=TableScorer(), score_threshold=threshold, top_n=top_n)
    assert contents(await compress(reranker, documents())) == BEST_FIRST[:expected]


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), "high"])
def test_threshold_must_be_a_finite_number(threshold: Any) -> None:
    with pytest.raises(ValidationError, match="score_threshold"):
        BGEReranker(score_threshold=threshold)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_key": "retrieval_rank", "keep_retrieval_score": True}, "keep_retrieval_score sets"),
        ({"score_key": "retrieval_score", "keep_retrieval_score": True}, "keep_retrieval_score sets"),
        ({"score_key": "rerank_truncated"}, "mark_unread sets"),
        ({"score_key": "rerank_blank"}, "mark_unread sets"),
    ],
)
def test_score_key_must_not_be_a_key_with_another_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BGEReranker(**options)
    BGEReranker(**{**options, "keep_retrieval_score": False, "mark_unread": False})


async def test_scores_are_normalized_unless_told_otherwise(
    compress: Compress, checkpoint: Path, scorer: Scorer, reranker: BGEReranker
) -> None:
    def by_text(returned: list[Document]) -> dict[str, float]:
        return {document.page_content: document.metadata["relevance_score"] for document in returned}

    logits = dict(zip(BEST_FIRST, scorer.score([(QUERY, text) for text in BEST_FIRST]), strict=True))
    raw = BGEReranker(model=str(checkpoint), device="cpu", dtype="float32", normalize=False)
    assert by_text(await compress(raw, documents())) == pytest.approx(logits, abs=TOLERANCE)
    expected = dict(
        zip(
            BEST_FIRST,
            scorer.compute_score([(QUERY, text) for text in BEST_FIRST], normalize=True),
            strict=True,
        )
    )
    assert by_text(await compress(reranker, documents())) == pytest.approx(expected, abs=TOLERANCE)
    assert all(0 < score < 1 for score in expected.values())
    assert not all(0 < score < 1 for score in logits.values())


async def test_no_documents_give_an_empty_list(compress: Compress) -> None:
    assert await compress(BGEReranker(scorer=TableScorer()), []) == []


# --- what is scored ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({}, "the text"),
        ({"rank_fields": ()}, "the text"),
        ({"rank_fields": ("title",)}, "title: Pandas\nthe text"),
        ({"rank_fields": ["year", "title"]}, "year: 2016\ntitle: Pandas\nthe text"),
        ({"rank_fields": ("nowhere", "title")}, "title: Pandas\nthe text"),
        ({"document_template": "{title} ({year})\n{page_content}"}, "Pandas (2016)\nthe text"),
        ({"document_template": "{year:>6}|{page_content!r}|{{}}"}, "  2016|'the text'|{}"),
    ],
)
async def test_text_of_a_document(compress: Compress, options: dict[str, Any], scored: str) -> None:
    scorer = TableScorer()
    given = Document(page_content="the text", metadata={"title": "Pandas", "year": 2016, "unused": "x"})
    (returned,) = await compress(BGEReranker(scorer=scorer, **options), [given])
    assert scorer.asked == [(QUERY, [scored])]
    assert returned.page_content == "the text"


async def test_braces_and_field_names_in_a_document_are_text(compress: Compress) -> None:
    scorer = TableScorer()
    reranker = BGEReranker(scorer=scorer, document_template="{title}: {page_content}")
    given = Document(
        page_content="{title} {0.__class__} {", metadata={"title": "{page_content}", "page_content": "forged"}
    )
    await compress(reranker, [given])
    assert scorer.asked == [(QUERY, ["{page_content}: {title} {0.__class__} {"])]


async def test_a_document_without_the_templates_field_is_named_by_index(compress: Compress) -> None:
    reranker = BGEReranker(scorer=TableScorer(), document_template="{title} {year} {page_content}")
    given = [
        Document(page_content=PANDA, metadata={"title": "Pandas", "year": 2016}),
        Document(page_content=BEAR, metadata={"title": "METADATA-CANARY"}),
    ]
    with pytest.raises(InputError, match=r"document 1 lacks .*year") as caught:
        await compress(reranker, given)
    assert caught.value.index == 1
    assert "CANARY" not in str(caught.value)


async def test_a_document_that_does_not_fit_the_templates_format_is_named_by_index(
    compress: Compress,
) -> None:
    reranker = BGEReranker(scorer=TableScorer(), document_template="{year:d} {page_content}")
    given = [
        Document(page_content=PANDA, metadata={"year": 2016}),
        Document(page_content=BEAR, metadata={"year": "METADATA-CANARY"}),
    ]
    with pytest.raises(InputError) as caught:
        await compress(reranker, given)
    assert caught.value.index == 1
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{title}",
        "{page_content",
        "{page_content} {}",
        "{page_content} {0}",
        "{page_content.upper}",
        "{page_content[0]}",
        "{page_content} {title.__class__}",
        "{page_content:{title.__class__}}",
    ],
)
def test_an_invalid_template_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="document_template"):
        BGEReranker(document_template=template)


def test_rank_fields_and_template_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="cannot both be set"):
        BGEReranker(rank_fields=("title",), document_template="{title} {page_content}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Document(page_content=PANDA), BEAR], "document 1 must be a Document, not str"),
        ([Document(page_content=PANDA), {"text": BEAR}], "document 1 must be a Document, not dict"),
    ],
)
async def test_only_documents_are_compressed(compress: Compress, given: Any, message: str) -> None:
    with pytest.raises(InputTypeError, match=message) as caught:
        await compress(BGEReranker(scorer=TableScorer()), given)
    assert caught.value.index == 1


async def test_a_query_must_be_a_string(compress: Compress, rerank: Rerank) -> None:
    reranker = BGEReranker(scorer=TableScorer())
    bad: Any = ["QUERY-CANARY"]
    with pytest.raises(InputTypeError, match="the query must be a string") as caught:
        await compress(reranker, documents(), bad)
    assert "CANARY" not in str(caught.value)
    with pytest.raises(InputTypeError, match="the query must be a string"):
        await rerank(reranker, [PANDA], bad)


# --- rerank, arerank, rerank_many --------------------------------------------------------------------


async def test_rerank_takes_strings_mappings_and_documents(rerank: Rerank) -> None:
    scorer = TableScorer({f"title: a\ntext: {PANDA}": 0.75, BEAR: 0.5, TEA: 0.25})
    given = [TEA, {"title": "a", "text": PANDA}, Document(page_content=BEAR, metadata={"title": "b"})]
    before = copy.deepcopy(given)
    assert await rerank(BGEReranker(scorer=scorer), given) == [
        {"index": 1, "relevance_score": 0.75},
        {"index": 2, "relevance_score": 0.5},
        {"index": 0, "relevance_score": 0.25},
    ]
    assert given == before


async def test_rerank_gives_plain_json(rerank: Rerank, reranker: BGEReranker) -> None:
    results = await rerank(reranker, BEST_FIRST)
    assert json.loads(json.dumps(results)) == results
    assert {type(result["relevance_score"]) for result in results} == {float}
    assert sorted(result["index"] for result in results) == [0, 1, 2]


@pytest.mark.parametrize(
    ("configured", "options", "scored"),
    [
        (None, {}, "title: a\nyear: 2016\ntext: t"),
        (None, {"rank_fields": ["text", "title"]}, "text: t\ntitle: a"),
        (None, {"rank_fields": ["title", "nowhere"]}, "title: a"),
        (("year",), {}, "year: 2016"),
        (("year",), {"rank_fields": None}, "year: 2016"),
        (("year",), {"rank_fields": ("text",)}, "text: t"),
    ],
)
async def test_text_of_a_mapping(
    rerank: Rerank, configured: tuple[str, ...] | None, options: dict[str, Any], scored: str
) -> None:
    scorer = TableScorer()
    await rerank(
        BGEReranker(scorer=scorer, rank_fields=configured),
        [{"title": "a", "year": 2016, "text": "t"}],
        **options,
    )
    assert scorer.asked == [(QUERY, [scored])]


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({}, "year: 2016\nt"),
        ({"rank_fields": None}, "year: 2016\nt"),
        ({"rank_fields": ["title"]}, "title: a\nt"),
        ({"rank_fields": []}, "t"),
    ],
)
async def test_rerank_takes_rank_fields_for_documents_too(
    rerank: Rerank, options: dict[str, Any], scored: str
) -> None:
    scorer = TableScorer()
    given = [Document(page_content="t", metadata={"title": "a", "year": 2016})]
    await rerank(BGEReranker(scorer=scorer, rank_fields=("year",)), given, **options)
    assert scorer.asked == [(QUERY, [scored])]


async def test_rank_fields_of_a_call_replace_the_template(rerank: Rerank) -> None:
    scorer = TableScorer()
    reranker = BGEReranker(scorer=scorer, document_template="{title}, {year}: {page_content}")
    given = [Document(page_content="t", metadata={"title": "a", "year": 2016})]
    await rerank(reranker, given)
    await rerank(reranker, given, rank_fields=["title"])
    assert scorer.asked == [(QUERY, ["a, 2016: t"]), (QUERY, ["title: a\nt"])]


async def test_rank_fields_that_are_one_string_are_refused(rerank: Rerank) -> None:
    with pytest.raises(ValidationError, match="rank_fields"):
        BGEReranker(rank_fields="title")
    with pytest.raises(InputTypeError, match="rank_fields"):
        await rerank(BGEReranker(scorer=TableScorer()), [{"title": "a"}], rank_fields="title")


@pytest.mark.parametrize(
    ("configured", "options", "expected"),
    [
        (2, {}, 2),
        (2, {"top_n": ...}, 2),
        (2, {"top_n": None}, 3),
        (2, {"top_n": 1}, 1),
        (2, {"top_n": 0}, 0),
        (None, {"top_n": 2}, 2),
        (0, {}, 0),
    ],
)
async def test_rerank_overrides_top_n(
    rerank: Rerank, rerank_many: RerankMany, configured: int | None, options: dict[str, Any], expected: int
) -> None:
    reranker = BGEReranker(scorer=TableScorer(), top_n=configured)
    results = await rerank(reranker, BEST_FIRST, **options)
    assert [result["index"] for result in results] == [0, 1, 2][:expected]
    (many,) = await rerank_many(reranker, [(QUERY, BEST_FIRST)], **options)
    assert many == results


@pytest.mark.parametrize("top_n", [-1, True, 1.5, "1"])
async def test_rerank_refuses_an_invalid_top_n(rerank: Rerank, rerank_many: RerankMany, top_n: Any) -> None:
    reranker = BGEReranker(scorer=TableScorer())
    with pytest.raises(InputError, match="top_n"):
        await rerank(reranker, BEST_FIRST, top_n=top_n)
    with pytest.raises(InputError, match="top_n"):
        await rerank_many(reranker, [(QUERY, BEST_FIRST)], top_n=top_n)


async def test_rerank_puts_blank_texts_last_and_says_so(rerank: Rerank, reranker: BGEReranker) -> None:
    results = await rerank(reranker, ["", PANDA, {"text": "x"}, " "], QUERY)
    assert sorted(result["index"] for result in results[:2]) == [1, 2]
    assert results[2:] == [{"index": index, "relevance_score": 0.0, "blank": True} for index in (0, 3)]
    assert all(result.keys() == {"index", "relevance_score"} for result in results[:2])


async def test_rerank_applies_the_threshold(rerank: Rerank, rerank_many: RerankMany) -> None:
    reranker = BGEReranker(scorer=TableScorer(), score_threshold=0.5)
    assert [result["index"] for result in await rerank(reranker, BEST_FIRST)] == [0, 1]
    (many,) = await rerank_many(reranker, [(QUERY, BEST_FIRST)])
    assert [result["index"] for result in many] == [0, 1]


@pytest.mark.parametrize("bad", [None, 3, b"TEXT-CANARY", ["TEXT-CANARY"]])
async def test_rerank_names_a_bad_document_by_index(rerank: Rerank, bad: Any) -> None:
    with pytest.raises(InputTypeError, match=f"document 1 must be .*{type(bad).__name__}") as caught:
        await rerank(BGEReranker(scorer=TableScorer()), [PANDA, bad])
    assert caught.value.index == 1
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("bad", [PANDA, {"text": PANDA}, Document(page_content=PANDA), 5, None])
async def test_rerank_refuses_one_text_in_place_of_several(rerank: Rerank, bad: Any) -> None:
    with pytest.raises(InputTypeError, match="documents must be a sequence") as caught:
        await rerank(BGEReranker(scorer=TableScorer()), bad)
    assert "CANARY" not in str(caught.value)


async def test_rerank_agrees_with_compress_documents(
    rerank: Rerank, compress: Compress, reranker: BGEReranker
) -> None:
    given = documents()
    returned, results = await compress(reranker, given), await rerank(reranker, given)
    assert [document.id for document in returned] == [given[result["index"]].id for result in results]
    assert [document.metadata["relevance_score"] for document in returned] == pytest.approx(
        [result["relevance_score"] for result in results], abs=TOLERANCE
    )


@pytest.mark.parametrize("own", [True, False])
async def test_rerank_many_is_rerank_for_each(
    rerank_many: RerankMany, own: bool, reranker: BGEReranker
) -> None:
    if not own:
        reranker = BGEReranker(scorer=TableScorer())
    requests: list[tuple[str, list[Any]]] = [
        (QUERY, [TEA, {"text": PANDA}, Document(page_content=BEAR)]),
        ("another query", []),
        (QUERY, BEST_FIRST),
        ("a third", [PANDA]),
    ]
    many = await rerank_many(reranker, requests)
    assert [len(results) for results in many] == [3, 0, 3, 1]
    for results, (query, texts) in zip(many, requests, strict=True):
        alone = reranker.rerank(texts, query)
        assert [result["index"] for result in results] == [result["index"] for result in alone]
        assert [result["relevance_score"] for result in results] == pytest.approx(
            [result["relevance_score"] for result in alone], abs=TOLERANCE
        )


async def test_rerank_many_of_nothing_needs_no_scorer(rerank_many: RerankMany) -> None:
    reranker = BGEReranker(scorer=BrokenScorer())
    assert await rerank_many(reranker, []) == []
    assert await rerank_many(reranker, [(QUERY, []), (QUERY, [])]) == [[], []]
    assert await rerank_many(reranker, [(QUERY, BEST_FIRST)], top_n=0) == [[]]


@pytest.mark.parametrize(
    "bad", ["QUERY-CANARY", ["QUERY-CANARY", "TEXT-CANARY"], [(QUERY, [PANDA]), (QUERY, [PANDA], 3)]]
)
async def test_rerank_many_refuses_malformed_requests(rerank_many: RerankMany, bad: Any) -> None:
    with pytest.raises(InputTypeError) as caught:
        await rerank_many(BGEReranker(scorer=TableScorer()), bad)
    assert "CANARY" not in str(caught.value)


def test_rerank_many_names_the_request_of_a_bad_document() -> None:
    with pytest.raises(InputTypeError, match=r"document 2.*int") as caught:
        BGEReranker(scorer=TableScorer()).rerank_many([(QUERY, [PANDA]), (QUERY, [PANDA, BEAR, 3])])  # type: ignore[list-item]
    assert "request 1" in str(caught.value)
    assert caught.value.index == 1
    with pytest.raises(InputTypeError, match="request 1: the query must be a string"):
        BGEReranker(scorer=TableScorer()).rerank_many([(QUERY, [PANDA]), (None, [PANDA])])  # type: ignore[list-item]


async def test_rerank_many_takes_rank_fields(rerank_many: RerankMany) -> None:
    scorer = TableScorer()
    reranker = BGEReranker(scorer=scorer, rank_fields=("year",))
    documents: list[Any] = [{"title": "a", "year": 2016}]
    await rerank_many(reranker, [(QUERY, documents)])
    await rerank_many(reranker, [(QUERY, documents)], rank_fields=("title",))
    assert scorer.asked == [(QUERY, ["year: 2016"]), (QUERY, ["title: a"])]


def test_rerank_many_applies_the_threshold(reranker: BGEReranker) -> None:
    (everything,) = reranker.rerank_many([(QUERY, BEST_FIRST)])
    threshold = everything[1]["relevance_score"] - TOLERANCE
    stricter = reranker.model_copy(update={"score_threshold": threshold})
    (results,) = stricter.rerank_many([(QUERY, BEST_FIRST)])
    assert [result["index"] for result in results] == [result["index"] for result in everything[:2]]


# --- async -------------------------------------------------------------------------------------------


async def test_many_async_calls_at_once_get_their_own_results(reranker: BGEReranker) -> None:
    queries = [f"{QUERY} {number}" for number in range(20)]
    at_once = await asyncio.gather(*(reranker.acompress_documents(documents(), query) for query in queries))
    for query, returned in zip(queries, at_once, strict=True):
        alone = reranker.compress_documents(documents(), query)
        assert [d.metadata["relevance_score"] for d in returned] == pytest.approx(
            [d.metadata["relevance_score"] for d in alone], abs=TOLERANCE
        )


# --- callbacks ---------------------------------------------------------------------------------------


async def test_a_run_reports_model_pairs_tokens_and_truncations(
    compress: Compress, reranker: BGEReranker, checkpoint: Path
) -> None:
    recorder = EventRecorder()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    short = [len(tokenizer.encode(QUERY, text).ids) for text in BEST_FIRST]
    given = documents([*BEST_FIRST, "bamboo " * 2000])
    reranker = reranker.model_copy(update={"top_n": 2})
    await compress(reranker, given, callbacks=[recorder])
    start, end = recorder.of_reranker()
    assert (start.kind, start.name, start.parent_run_id) == ("start", "BGEReranker", None)
    assert start.data == {"model": str(checkpoint), "num_pairs": 4}
    assert end.kind == "end"
    assert end.data == {
        "model": str(checkpoint),
        "num_pairs": 4,
        "num_tokens": sum(short) + 512,
        "num_truncated": 1,
        "num_truncated_queries": 0,
        "num_blank": 0,
        "num_returned": 2,
    }


async def test_a_run_reports_a_truncated_query_and_blank_documents(
    compress: Compress, reranker: BGEReranker
) -> None:
    recorder = EventRecorder()
    given = documents([PANDA, "", "bamboo " * 2000, " "])
    await compress(reranker, given, query="what " * 1000, callbacks=[recorder])
    _, end = recorder.of_reranker()
    figures = ("num_pairs", "num_truncated", "num_truncated_queries", "num_blank", "num_returned")
    assert {name: end.data[name] for name in figures} == dict(zip(figures, (4, 1, 1, 2, 4), strict=True))


@pytest.mark.parametrize("wrap", [list, CallbackManager, AsyncCallbackManager])
async def test_a_scorer_of_ones_own_is_traced_by_its_type(
    compress: Compress, wrap: Callable[[list[BaseCallbackHandler]], Any]
) -> None:
    recorder = EventRecorder()
    await compress(BGEReranker(scorer=TableScorer()), documents(), callbacks=wrap([recorder]))
    start, end = recorder.of_reranker()
    assert start.data["model"] == end.data["model"] == "TableScorer"
    assert (end.data["num_pairs"], end.data["num_tokens"], end.data["num_truncated"]) == (3, None, None)


async def test_an_empty_call_is_a_run_of_no_pairs(compress: Compress) -> None:
    recorder = EventRecorder()
    await compress(BGEReranker(scorer=TableScorer()), [], callbacks=[recorder])
    assert [(event.kind, event.data["num_pairs"]) for event in recorder.of_reranker()] == [
        ("start", 0),
        ("end", 0),
    ]


@pytest.mark.parametrize("scorer_type", [TableScorer, BrokenScorer])
async def test_a_run_never_holds_text(compress: Compress, scorer_type: type[TableScorer]) -> None:
    recorder, collector = EventRecorder(), RunCollectorCallbackHandler()
    reranker = BGEReranker(scorer=scorer_type(), rank_fields=("title", "secret"), keep_retrieval_score=True)
    failed = False
    try:
        await compress(reranker, documents(), callbacks=[recorder, collector])
    except RuntimeError:
        failed = True
    assert failed == (scorer_type is BrokenScorer)
    assert [event.kind for event in recorder.of_reranker()] == ["start", "error" if failed else "end"]
    (run,) = collector.traced_runs
    for seen in [*(event.everything for event in recorder.events), run.model_dump_json(), repr(run)]:
        assert "CANARY" not in seen


async def test_a_run_ends_with_the_error_of_the_scorer(compress: Compress) -> None:
    recorder = EventRecorder()
    with pytest.raises(RuntimeError, match="the device is on fire") as caught:
        await compress(BGEReranker(scorer=BrokenScorer()), documents(), callbacks=[recorder])
    start, error = recorder.of_reranker()
    assert (start.kind, error.kind) == ("start", "error")
    assert error.data is caught.value


async def test_a_cancelled_run_ends() -> None:
    recorder, scorer = EventRecorder(), StuckScorer()
    reranker = BGEReranker(scorer=scorer)
    task = asyncio.create_task(reranker.acompress_documents(documents(), QUERY, [recorder]))
    await scorer.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [event.kind for event in recorder.of_reranker()] == ["start", "error"]


def runs_by_name(root: Run) -> dict[str, Run]:
    named = {root.name: root}
    for child in root.child_runs:
        named |= runs_by_name(child)
    return named


def chain_over(reranker: BGEReranker) -> Runnable[Any, Any]:
    return (compression(reranker) | RunnableLambda(contents)).with_config(run_name="chain")


async def test_a_tracer_shows_the_run_under_its_retriever(invoke: Invoke) -> None:
    collector, recorder = RunCollectorCallbackHandler(), EventRecorder()
    answer = await invoke(chain_over(BGEReranker(scorer=TableScorer())), {"callbacks": [collector, recorder]})
    assert answer == BEST_FIRST
    (root,) = collector.traced_runs
    runs = runs_by_name(root)
    run, retriever = runs["BGEReranker"], runs["ContextualCompressionRetriever"]
    assert run.parent_run_id == retriever.id
    assert run.trace_id == root.id
    assert (run.run_type, run.error) == ("chain", None)
    assert run.inputs == {"model": "TableScorer", "num_pairs": 3}
    assert run.outputs is not None
    assert run.outputs["num_returned"] == 3
    assert run.end_time is not None
    assert [event.parent_run_id for event in recorder.of_reranker()] == [retriever.id] * 2


async def test_a_tracer_shows_an_error_under_its_retriever(invoke: Invoke) -> None:
    collector = RunCollectorCallbackHandler()
    with pytest.raises(RuntimeError, match="the device is on fire"):
        await invoke(chain_over(BGEReranker(scorer=BrokenScorer())), {"callbacks": [collector]})
    (root,) = collector.traced_runs
    runs = runs_by_name(root)
    run = runs["BGEReranker"]
    assert run.parent_run_id == runs["ContextualCompressionRetriever"].id
    assert run.error is not None
    assert "the device is on fire" in run.error
    assert run.end_time is not None


def streamed_chain(mode: str, reranker: BGEReranker) -> Runnable[Any, Any]:
    """Return a chain that is streamed asynchronously and calls the retriever in the given way."""
    retriever = compression(reranker)
    if mode == "async":
        return chain_over(reranker)
    return RunnableLambda(lambda query: contents(retriever.invoke(query)))


async def test_stream_events_show_the_run(mode: str) -> None:
    if mode == "sync":
        skip_without_task_contexts()
    chain = streamed_chain(mode, BGEReranker(scorer=TableScorer()))
    events = [event async for event in chain.astream_events(QUERY, version="v2")]
    (retriever,) = {e["run_id"] for e in events if e["name"] == "ContextualCompressionRetriever"}
    start, end = [event for event in events if event["name"] == "BGEReranker"]
    assert (start["event"], end["event"]) == ("on_chain_start", "on_chain_end")
    assert start["run_id"] == end["run_id"]
    assert start["parent_ids"][-1] == end["parent_ids"][-1] == retriever
    assert start["data"]["input"] == {"model": "TableScorer", "num_pairs": 3}
    output = end["data"]["output"]
    assert {"model", "num_pairs", "num_tokens", "num_truncated"} <= set(output)
    assert "CANARY" not in repr((start, end))


async def test_stream_events_show_a_run_that_fails(mode: str) -> None:
    if mode == "sync":
        skip_without_task_contexts()
    events: list[StreamEvent] = []

    async def stream() -> None:
        chain = streamed_chain(mode, BGEReranker(scorer=BrokenScorer()))
        async for event in chain.astream_events(QUERY, version="v2"):
            events.append(event)  # noqa: PERF401  # those before the error are wanted

    with pytest.raises(RuntimeError, match="the device is on fire"):
        await stream()
    assert [e["event"] for e in events if e["name"] == "BGEReranker"] == ["on_chain_start"]


async def test_callbacks_are_inherited_inside_a_runnable(mode: str, invoke: Invoke) -> None:
    if mode == "async":
        skip_without_task_contexts()
    reranker = BGEReranker(scorer=TableScorer())
    collector = RunCollectorCallbackHandler()

    def compress(query: str) -> list[str]:
        return contents(reranker.compress_documents(documents(), query))

    async def acompress(query: str) -> list[str]:
        return contents(await reranker.acompress_documents(documents(), query))

    step: Runnable[str, list[str]] = RunnableLambda(compress, acompress, name="step")
    assert await invoke(step, {"callbacks": [collector]}) == BEST_FIRST
    (root,) = collector.traced_runs
    assert root.name == "step"
    assert [(run.name, run.parent_run_id) for run in root.child_runs] == [("BGEReranker", root.id)]


async def test_rerank_is_traced_inside_a_runnable(mode: str, invoke: Invoke) -> None:
    if mode == "async":
        skip_without_task_contexts()
    reranker = BGEReranker(scorer=TableScorer())
    collector = RunCollectorCallbackHandler()

    def rerank(query: str) -> int:
        return len(reranker.rerank(BEST_FIRST, query))

    async def arerank(query: str) -> int:
        return len(await reranker.arerank(BEST_FIRST, query))

    assert await invoke(RunnableLambda(rerank, arerank), {"callbacks": [collector]}) == 3
    (root,) = collector.traced_runs
    assert [run.name for run in root.child_runs] == ["BGEReranker"]


@pytest.mark.parametrize("own", [True, False])
async def test_rerank_many_is_one_run(
    rerank_many: RerankMany, own: bool, reranker: BGEReranker, checkpoint: Path, mode: str
) -> None:
    if mode == "async":
        skip_without_task_contexts()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    requests = [(QUERY, [TEA, PANDA]), ("another", []), ("a third", [BEAR, "bamboo " * 2000])]
    num_tokens = sum(
        len(tokenizer.encode(q, text).ids) for q, text in [(QUERY, TEA), (QUERY, PANDA), ("a third", BEAR)]
    )
    options: dict[str, Any] = {} if own else {"scorer": TableScorer()}
    each = reranker.model_copy(update={"top_n": 1}) if own else BGEReranker(top_n=1, **options)
    collector = RunCollectorCallbackHandler()

    def rerank(_: str) -> int:
        return len(each.rerank_many(requests))

    async def arerank(_: str) -> int:
        return len(await rerank_many(each, requests))

    step: Runnable[str, int] = RunnableLambda(rerank, arerank)
    config: RunnableConfig = {"callbacks": [collector]}
    assert (step.invoke(QUERY, config) if mode == "sync" else await step.ainvoke(QUERY, config)) == 3
    (root,) = collector.traced_runs
    (run,) = root.child_runs
    model = str(checkpoint) if own else "TableScorer"
    assert (run.name, run.inputs) == ("BGEReranker", {"model": model, "num_pairs": 4})
    assert run.outputs is not None
    expected = (
        {"num_tokens": num_tokens + 512, "num_truncated": 1}
        if own
        else {"num_tokens": None, "num_truncated": None}
    )
    assert run.outputs.items() >= {"model": model, "num_pairs": 4, "num_returned": 2, **expected}.items()


async def test_a_failed_rerank_many_ends_its_run(rerank_many: RerankMany, mode: str) -> None:
    if mode == "async":
        skip_without_task_contexts()
    collector = RunCollectorCallbackHandler()
    reranker = BGEReranker(scorer=BrokenScorer())

    async def arerank(_: str) -> Any:
        return await rerank_many(reranker, [(QUERY, BEST_FIRST)])

    step: Runnable[str, Any] = RunnableLambda(lambda _: reranker.rerank_many([(QUERY, BEST_FIRST)]), arerank)
    with pytest.raises(RuntimeError, match="the device is on fire"):
        _ = (
            step.invoke(QUERY, {"callbacks": [collector]})
            if mode == "sync"
            else await step.ainvoke(QUERY, {"callbacks": [collector]})
        )
    (root,) = collector.traced_runs
    (run,) = root.child_runs
    assert run.error is not None
    assert "CANARY" not in run.model_dump_json()


async def test_compress_works_without_callbacks(compress: Compress) -> None:
    reranker = BGEReranker(scorer=TableScorer())
    assert contents(await compress(reranker, documents(), callbacks=None)) == BEST_FIRST
    assert contents(await compress(reranker, documents(), callbacks=[])) == BEST_FIRST


# --- as a cross-encoder ------------------------------------------------------------------------------


def test_cross_encoder_scores_pairs_in_order(reranker: BGEReranker) -> None:
    encoder = reranker.as_cross_encoder()
    assert isinstance(encoder, BaseCrossEncoder)
    pairs = [(QUERY, TEA), ("another", PANDA), (QUERY, PANDA), ("another", TEA), (QUERY, TEA)]
    scores = encoder.score(pairs)
    for (query, text), score in zip(pairs, scores, strict=True):
        (alone,) = reranker.rerank([text], query)
        assert score == pytest.approx(alone["relevance_score"], abs=TOLERANCE)
    assert {type(score) for score in scores} == {float}


def test_cross_encoder_needs_no_model_without_pairs(tmp_path: Path) -> None:
    assert BGEReranker(model=tmp_path / "nowhere").as_cross_encoder().score([]) == []


async def test_a_request_without_documents_does_not_reach_the_scorer(rerank_many: RerankMany) -> None:
    scorer = TableScorer()
    results = await rerank_many(BGEReranker(scorer=scorer), [(QUERY, []), (QUERY, [TEA])])
    assert [len(result) for result in results] == [0, 1]
    assert scorer.asked == [(QUERY, [TEA])]


def test_cross_encoder_ignores_top_n_and_threshold() -> None:
    encoder = BGEReranker(scorer=TableScorer(), top_n=1, score_threshold=0.8).as_cross_encoder()
    assert encoder.score([(QUERY, TEA), (QUERY, PANDA), (QUERY, BEAR)]) == [0.1, 0.9, 0.5]


def test_cross_encoder_puts_blank_passages_lowest(reranker: BGEReranker, checkpoint: Path) -> None:
    pairs = [(QUERY, ""), (QUERY, TEA), ("another", " \n"), ("another", TEA)]
    scores = reranker.as_cross_encoder().score(pairs)
    assert (scores[0], scores[2]) == (0.0, 0.0)
    assert min(scores[1], scores[3]) > 0.0
    raw = BGEReranker(model=str(checkpoint), device="cpu", dtype="float32", normalize=False)
    assert raw.as_cross_encoder().score(pairs[:1]) == [-65504.0]
    refusing = BGEReranker(model=str(checkpoint), device="cpu", dtype="float32", blank_passages="refuse")
    for bad, index in ((pairs, 0), ([pairs[1], pairs[3], pairs[2]], 2), ([pairs[1], (" ", TEA)], 1)):
        with pytest.raises(InputError, match=f"^pair {index}: .*is blank") as caught:
            refusing.as_cross_encoder().score(bad)
        assert caught.value.index == index


class Recorder(PackageScorer):
    """A scorer like those of this package. It records the arguments of `rank_many`."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> Ranking:
        return Ranking(TableScorer().rank(query, passages, top_n, threshold))

    async def arank(self, query: str, passages: Sequence[str], *args: Any, **kwargs: Any) -> Ranking:
        raise AssertionError("unreachable")

    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        requests = list(requests)
        self.calls.append((requests, top_n, threshold, timeout, normalize))
        return [self.rank(query, passages) for query, passages in requests]

    async def arank_many(self, *args: Any, **kwargs: Any) -> list[Ranking]:
        raise AssertionError("unreachable")


def test_cross_encoder_ranks_all_queries_in_one_call() -> None:
    scorer = Recorder()
    encoder = BGEReranker(scorer=scorer, timeout=3, top_n=1, normalize=False).as_cross_encoder()
    pairs = [("a", TEA), ("b", PANDA), ("a", PANDA), ("b", BEAR)]
    assert encoder.score(pairs) == [0.1, 0.9, 0.9, 0.5]
    assert scorer.calls == [([("a", [TEA, PANDA]), ("b", [PANDA, BEAR])], None, None, 3, False)]


def test_cross_encoder_names_the_pair_whose_score_is_not_finite() -> None:
    class Overflow(Recorder):
        def rank_many(self, *args: Any, **kwargs: Any) -> list[Ranking]:
            raise NonFiniteScoreError("the model's score of pair 2 is not finite", index=2)

    encoder = BGEReranker(scorer=Overflow()).as_cross_encoder()
    with pytest.raises(NonFiniteScoreError, match=r"^pair 1: the model's score of the passage is") as caught:
        encoder.score([("a", TEA), ("b", PANDA), ("a", PANDA), ("b", BEAR)])
    assert caught.value.index == 1


def test_cross_encoder_keeps_an_error_that_names_no_pair() -> None:
    class Overflow(Recorder):
        def rank_many(self, *args: Any, **kwargs: Any) -> list[Ranking]:
            raise NonFiniteScoreError("a score is not finite")

    with pytest.raises(NonFiniteScoreError, match=r"^a score is not finite$") as caught:
        BGEReranker(scorer=Overflow()).as_cross_encoder().score([("a", TEA), ("b", PANDA)])
    assert caught.value.index is None


def test_cross_encoder_gives_python_floats() -> None:
    scorer = TableScorer({TEA: np.float32(0.5)})  # type: ignore[dict-item]
    [score] = BGEReranker(scorer=scorer).as_cross_encoder().score([("a", TEA)])
    assert (type(score), score) == (float, 0.5)


async def test_an_error_of_a_users_scorer_that_names_no_pair_is_kept(rerank_many: RerankMany) -> None:
    class Overflow(TableScorer):
        def rank(self, *args: Any, **kwargs: Any) -> list[RankedPassage]:
            raise NonFiniteScoreError("a score is not finite")

    with pytest.raises(NonFiniteScoreError, match="a score is not finite") as caught:
        await rerank_many(BGEReranker(scorer=Overflow()), [(QUERY, [TEA]), (QUERY, [PANDA])])
    assert caught.value.index is None


def test_cross_encoder_names_the_pair_of_a_users_scorer_too() -> None:
    class Overflow(TableScorer):
        def rank(self, query: str, passages: Sequence[str], *limits: Any) -> list[RankedPassage]:
            if query == "b":
                raise NonFiniteScoreError("the score of passage 1 is not finite", index=1)
            return super().rank(query, passages, *limits)

    reranker = BGEReranker(scorer=Overflow())
    with pytest.raises(NonFiniteScoreError, match=r"^pair 3: the score of the passage is") as caught:
        reranker.as_cross_encoder().score([("a", TEA), ("b", PANDA), ("a", PANDA), ("b", BEAR)])
    assert caught.value.index == 3
    with pytest.raises(NonFiniteScoreError) as caught:
        reranker.rerank_many([("a", [TEA, PANDA]), ("b", [PANDA, BEAR])])
    assert caught.value.index == 3, "as in `Scorer.rank_many`"


def test_a_ranking_may_come_from_a_generator_and_hold_numbers_of_numpy() -> None:
    class Lazy(TableScorer):
        def rank(self, *args: Any, **kwargs: Any) -> Any:
            ranked = super().rank(*args, **kwargs)
            return (RankedPassage(np.int64(each.index), np.float32(each.score)) for each in ranked)  # type: ignore[arg-type]

    reranker = BGEReranker(scorer=Lazy(), keep_retrieval_score=True)
    returned = reranker.compress_documents(documents(), QUERY)
    assert contents(returned) == BEST_FIRST
    json.dumps([document.metadata for document in returned])
    json.dumps(reranker.rerank(documents(), QUERY))
    assert reranker.as_cross_encoder().score([(QUERY, TEA)]) == [pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("ranked", "message"),
    [
        (None, "must return RankedPassage objects"),
        ([(0, 1.0)], "must return RankedPassage objects"),
        ([RankedPassage(0.5, 1.0)], "must return RankedPassage objects"),  # type: ignore[arg-type]
        ([RankedPassage(0, "high")], "must return RankedPassage objects"),  # type: ignore[arg-type]
        ([RankedPassage(0, 10**400)], "must return RankedPassage objects"),
        ([RankedPassage(3, 1.0)], "returned index 3 for 3 passages"),
        ([RankedPassage(-1, 1.0)], "returned index -1 for 3 passages"),
        ([RankedPassage(1, 1.0), RankedPassage(1, 0.5)], "returned index 1 twice for 3 passages"),
        ([RankedPassage(2, float("nan"))], "returned NaN for passage 2"),
    ],
)
async def test_a_wrong_ranking_of_a_users_scorer_is_refused(
    compress: Compress, ranked: Any, message: str
) -> None:
    class Wrong(TableScorer):
        def rank(self, *args: Any, **kwargs: Any) -> list[RankedPassage]:
            return ranked  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match=f"the scorer Wrong {message}"):
        await compress(BGEReranker(scorer=Wrong()), documents())


def test_cross_encoder_refuses_a_ranking_that_leaves_out_a_passage() -> None:
    class Choosy(TableScorer):
        def rank(self, *args: Any, **kwargs: Any) -> list[RankedPassage]:
            return super().rank(*args, **kwargs)[:1]

    encoder = BGEReranker(scorer=Choosy()).as_cross_encoder()
    with pytest.raises(ConfigError, match="the scorer Choosy returned no score for some passages"):
        encoder.score([(QUERY, TEA), (QUERY, PANDA)])


async def test_an_error_of_a_users_scorer_names_the_request() -> None:
    class Picky(TableScorer):
        def rank(self, query: str, passages: Sequence[str], *limits: Any) -> list[RankedPassage]:
            if TEA in passages:
                raise InputError("passage 0 is tea", index=0)
            return super().rank(query, passages, *limits)

    reranker = BGEReranker(scorer=Picky())
    requests = [("a", [PANDA]), ("b", [TEA])]
    with pytest.raises(InputError, match=r"^request 1: passage 0 is tea") as caught:
        reranker.rerank_many(requests)
    assert caught.value.index == 1
    with pytest.raises(InputError, match=r"^request 1: passage 0 is tea") as caught:
        await reranker.arerank_many(requests)
    assert caught.value.index == 1


@pytest.mark.parametrize("names", [iter(["title"]), (name for name in ["title"]), ["title"]])
def test_the_names_of_fields_may_come_from_an_iterator(names: Any) -> None:
    scorer = TableScorer()
    found = [{"id": 1, "title": TEA}, {"id": 2, "title": PANDA}]
    requests = [("a", found), ("b", found)]
    assert BGEReranker(scorer=scorer).rerank_many(requests, rank_fields=names)
    assert scorer.asked == [(query, [f"title: {TEA}", f"title: {PANDA}"]) for query in ("a", "b")]


@pytest.mark.parametrize(
    ("names", "message", "index"),
    [
        (5, "rank_fields must be a sequence of names, not int", None),
        ("title", "rank_fields must be a sequence of names, not str", None),
        (["title", None], "name 1 of rank_fields must be a string, not NoneType", 1),
    ],
)
def test_wrong_names_of_fields_are_refused(names: Any, message: str, index: int | None) -> None:
    reranker = BGEReranker(scorer=TableScorer())
    for call in (
        lambda: reranker.rerank([TEA], QUERY, rank_fields=names),
        lambda: reranker.rerank_many([(QUERY, [TEA])], rank_fields=names),
    ):
        with pytest.raises(InputTypeError, match=message) as caught:
            call()
        assert caught.value.index == index


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"relevance_score": 0.25, "score": 0.5}, 0.25),
        ({"relevance_score": None, "score": 0.5}, 0.5),
        ({"score": np.float32(0.5)}, 0.5),
        ({"score": None}, None),
        ({"score": float("nan")}, None),
        ({"score": "3-1"}, None),
        ({"score": True}, None),
        ({"score": Decimal("snan")}, None),
        ({"retrieval_score": 0.75}, 0.75),
        ({"retrieval_score": 0.75, "retrieval_rank": 3}, None),
    ],
)
async def test_only_a_number_is_kept_as_the_score_of_the_retriever(
    compress: Compress, metadata: dict[str, Any], expected: float | None
) -> None:
    given = [Document(TEA, metadata=metadata)]
    (returned,) = await compress(BGEReranker(scorer=TableScorer(), keep_retrieval_score=True), given)
    assert returned.metadata.get("retrieval_score", None) == expected
    assert ("retrieval_score" in returned.metadata) == (expected is not None)


async def test_a_document_of_another_framework_is_named_with_its_module(compress: Compress) -> None:
    class Document:
        page_content = TEA

    reranker = BGEReranker(scorer=TableScorer())
    name = rf"{__name__}\.Document"
    with pytest.raises(InputTypeError, match=f"document 0 must be a Document, not {name}"):
        await compress(reranker, [Document()])  # type: ignore[list-item]
    with pytest.raises(
        InputTypeError, match=f"document 0 must be a string, a mapping or a Document, not {name}"
    ):
        reranker.rerank([Document()], QUERY)  # type: ignore[list-item]


def test_a_refused_assignment_leaves_no_trace() -> None:
    reranker = BGEReranker(model="embedded")
    with pytest.raises(ValidationError):
        reranker.score_threshold = 2.0
    assert reranker.model_fields_set == {"model"}
    assert "score_threshold" not in reranker.model_dump(exclude_unset=True)


def test_a_copy_of_a_subclass_keeps_and_changes_undeclared_options() -> None:
    class Loose(BGEReranker):
        model_config = ConfigDict(extra="allow")

    reranker = Loose(model="embedded", note="a", other="b")  # type: ignore[call-arg]
    copied: Any = reranker.model_copy(update={"note": "c", "top_n": 3})
    assert (copied.note, copied.other, copied.top_n) == ("c", "b", 3)
    first: Any = Loose(model="embedded").model_copy(update={"note": "d"})
    assert first.note == "d"
    assert reranker.note == "a"  # type: ignore[attr-defined]


def test_cross_encoder_names_a_bad_pair_by_index() -> None:
    encoder = BGEReranker(scorer=TableScorer()).as_cross_encoder()
    with pytest.raises(InputTypeError, match="pair 1") as caught:
        encoder.score([(QUERY, TEA), ("TEXT-CANARY",)])  # type: ignore[list-item]
    assert caught.value.index == 1
    assert "CANARY" not in str(caught.value)


def test_cross_encoder_reranker_of_langchain_takes_it(reranker: BGEReranker) -> None:
    theirs = CrossEncoderReranker(model=reranker.as_cross_encoder(), top_n=2)
    ours = reranker.model_copy(update={"top_n": 2})
    assert contents(theirs.compress_documents(documents(), QUERY)) == contents(
        ours.compress_documents(documents(), QUERY)
    )


# --- options, dumps and copies -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"documents": documents()},
        {"topn": PANDA},
        {"rank_fields": PANDA},
        {"top_n": documents()},
        {"scorer": PANDA},
        {"model": documents()},
        {"device": PANDA},
        {"long_passages": PANDA},
        {"document_template": PANDA},
        {"score_key": ""},
    ],
    ids=lambda options: next(iter(options)),
)
def test_invalid_options_are_refused_without_showing_them(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        BGEReranker(**options)
    assert next(iter(options)) in str(caught.value)
    assert "CANARY" not in str(caught.value) + repr(caught.value)


def test_positional_options_are_refused() -> None:
    with pytest.raises(TypeError):
        BGEReranker("BAAI/bge-reranker-base")  # type: ignore[call-arg]


def test_settings_cannot_be_combined_with_a_scorer() -> None:
    with pytest.raises(ValidationError, match=r"\['model', 'max_length'\] cannot be combined with scorer"):
        BGEReranker(scorer=TableScorer(), model="BAAI/bge-reranker-large", max_length=256)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("top_n", -1),
        ("max_length", 3),
        ("dtype", "int4"),
        ("device", "tpu"),
        ("document_template", "{title}"),
        ("scorer", "not a scorer"),
        ("no_such_option", 1),
    ],
)
def test_a_wrong_assignment_is_refused_and_undone(name: str, bad: Any) -> None:
    reranker = BGEReranker(top_n=3)
    before = reranker.model_dump()
    with pytest.raises(ValidationError):
        setattr(reranker, name, bad)
    assert reranker.model_dump() == before


def test_a_contradicting_assignment_is_refused_and_undone() -> None:
    reranker = BGEReranker(rank_fields=("title",))
    with pytest.raises(ValidationError, match="cannot both be set"):
        reranker.document_template = "{title} {page_content}"
    assert reranker.document_template is None


def test_a_good_assignment_takes_effect() -> None:
    reranker = BGEReranker(scorer=TableScorer())
    reranker.top_n = 1
    assert contents(reranker.compress_documents(documents(), QUERY)) == [PANDA]


def test_json_schema_describes_the_options() -> None:
    schema = BGEReranker.model_json_schema()
    assert {"model", "top_n", "score_threshold", "score_key"} <= set(schema["properties"])
    json.dumps(schema)


def test_dumps_are_json_and_rebuild_the_same() -> None:
    reranker = BGEReranker(model="BAAI/bge-reranker-large", top_n=3, rank_fields=("title",), normalize=False)
    assert BGEReranker(**json.loads(json.dumps(reranker.model_dump()))) == reranker
    assert BGEReranker.model_validate_json(reranker.model_dump_json()) == reranker


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "model_copy"])
def test_copies_hold_no_weights_and_share_the_scorer(
    copier: str, reranker: BGEReranker, checkpoint: Path
) -> None:
    reranker.compress_documents(documents(), QUERY)
    data = pickle.dumps(reranker)
    assert len(data) < 4096 < (checkpoint / "model.safetensors").stat().st_size
    copiers: dict[str, Callable[[], BGEReranker]] = {
        "pickle": lambda: pickle.loads(data),
        "deepcopy": lambda: copy.deepcopy(reranker),
        "model_copy": lambda: reranker.model_copy(deep=True),
    }
    copied = copiers[copier]()
    assert copied == reranker
    assert copied is not reranker
    assert copied.resolve_scorer() is reranker.resolve_scorer()


def test_copies_of_a_reranker_with_its_own_scorer(scorer: Scorer) -> None:
    reranker = BGEReranker(scorer=scorer, top_n=2)
    assert copy.deepcopy(reranker).scorer is scorer
    data = pickle.dumps(reranker)
    assert len(data) < 4096
    unpickled: BGEReranker = pickle.loads(data)
    assert isinstance(unpickled.scorer, Scorer)
    assert unpickled.scorer.config == scorer.config
    assert contents(unpickled.compress_documents(documents(), QUERY)) == contents(
        reranker.compress_documents(documents(), QUERY)
    )


def test_secrets_are_not_shown_anywhere(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_SECRET")
    reranker = BGEReranker(model=str(checkpoint), device="cpu", dtype="float32", max_batch_tokens=7002)
    try:
        reranker.compress_documents(documents(), QUERY)
        for seen in (
            repr(reranker),
            str(reranker),
            repr(reranker.model_dump()),
            reranker.model_dump_json(),
            repr(pickle.dumps(reranker)),
            repr(reranker.resolve_scorer()),
            repr(vars(reranker)),
        ):
            assert "hf_SECRET" not in seen
    finally:
        Scorer.shared(reranker.scorer_config()).close()
    with pytest.raises(ValidationError, match="token"):
        BGEReranker(token="hf_SECRET")  # type: ignore[call-arg]


# --- inside other parts of LangChain -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"), [([], []), (documents(), ["TEXT-CANARY pandas", "TEXT-CANARY bears"])]
)
async def test_document_compressor_pipeline(mode: str, given: list[Document], expected: list[str]) -> None:
    pipeline = DocumentCompressorPipeline(
        transformers=[
            BGEReranker(scorer=TableScorer(), score_threshold=0.2),
            BGEReranker(scorer=TableScorer(), top_n=2),
            FirstWords(),
        ]
    )
    collector = RunCollectorCallbackHandler()
    if mode == "sync":
        returned = pipeline.compress_documents(given, QUERY, [collector])
    else:
        returned = await pipeline.acompress_documents(given, QUERY, [collector])
    assert contents(returned) == expected
    assert [run.name for run in collector.traced_runs] == ["BGEReranker", "BGEReranker"]


async def test_compression_retriever_that_finds_nothing(invoke: Invoke) -> None:
    retriever = ContextualCompressionRetriever(
        base_compressor=BGEReranker(scorer=BrokenScorer()), base_retriever=FixedRetriever(documents=[])
    )
    assert await invoke(retriever, {}) == []


class CompressionRetrieverWithK(ContextualCompressionRetriever):
    """A retriever for LangChain's standard tests, with the reranker's `top_n` as `k`."""

    def __init__(self, *, model: str, k: int | None = None) -> None:
        super().__init__(
            base_compressor=BGEReranker(model=model, device="cpu", dtype="float32", top_n=k),
            base_retriever=FixedRetriever(documents=documents([*BEST_FIRST, "a fourth", "a fifth"])),
        )


class TestStandardRetriever(RetrieversIntegrationTests):
    """LangChain's standard tests for retrievers."""

    checkpoint: Path

    @pytest.fixture(autouse=True)
    def _take_checkpoint(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    @property
    def retriever_constructor(self) -> type[CompressionRetrieverWithK]:
        return CompressionRetrieverWithK

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"model": str(self.checkpoint)}

    @property
    def retriever_query_example(self) -> str:
        return QUERY


class NAType:
    """Stands for pandas' NA. A comparison with it is neither true nor false."""

    def __ne__(self, other: object) -> Any:
        return self

    def __eq__(self, other: object) -> Any:
        return self

    def __hash__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


class NotATime(datetime):
    """Stands for pandas' NaT, a date that differs from itself."""

    __hash__ = datetime.__hash__

    def __ne__(self, other: object) -> bool:
        return True


@pytest.mark.parametrize(
    "missing",
    [
        float("nan"),
        np.float32("nan"),
        np.float64("nan"),
        np.datetime64("NaT"),
        np.timedelta64("NaT"),
        Decimal("nan"),
        Decimal("snan"),
        NotATime(2000, 1, 1),
        NAType(),
        None,
    ],
)
def test_every_kind_of_nan_is_a_missing_field(missing: object) -> None:
    scorer = TableScorer()
    document = Document(page_content=PANDA, metadata={"year": missing})
    BGEReranker(scorer=scorer, rank_fields=["year"]).compress_documents([document], "q")
    assert scorer.asked == [("q", [PANDA])]


@pytest.mark.parametrize("value", ["x", 10**400])
def test_a_value_that_does_not_fit_its_format_is_refused(value: object) -> None:
    document = Document(page_content=PANDA, metadata={"size": value})
    adapter = BGEReranker(scorer=TableScorer(), document_template="{size:.1f} {page_content}")
    with pytest.raises(InputError, match="a metadata field of document 0 does not fit its format"):
        adapter.compress_documents([document], "q")


@pytest.mark.parametrize("template", ["{page_content!z}", "{page_content:d}", "{a!z} {page_content}"])
def test_a_template_that_no_text_fits_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="not a valid format string"):
        BGEReranker(document_template=template)


def test_metadata_of_another_type_of_dict_with_values_that_cannot_be_copied() -> None:
    document = Document(page_content=PANDA)
    document.metadata = defaultdict(list, {"lock": threading.Lock()})
    (ranked,) = BGEReranker(scorer=TableScorer()).compress_documents([document], "q")
    assert "relevance_score" in ranked.metadata
    assert list(document.metadata) == ["lock"]
