"""`BGERerankPostprocessor` in LlamaIndex: returned nodes, scored texts, events, and use in other components."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

import pytest
import torch
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    ImageNode,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from pydantic import Field, ValidationError

from bge_rerank_integrations import BGERerankPostprocessor, Scorer
from bge_rerank_integrations.errors import InputError, InputTypeError
from tests.support.scorers import BEAR, BEST_FIRST, PANDA, TEA, BrokenScorer, StuckScorer, TableScorer
from tests.support.tolerances import LOGIT_TOLERANCE

QUERY = "what does a panda eat?"
TOLERANCE = LOGIT_TOLERANCE[torch.float32]


class UnpicklableScorer(TableScorer):
    """A scorer that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class EventRecorder(BaseEventHandler):
    """Records all instrumentation events."""

    events: list[BaseEvent] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "EventRecorder"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)

    def of_reranking(self) -> list[ReRankStartEvent | ReRankEndEvent]:
        return [event for event in self.events if isinstance(event, ReRankStartEvent | ReRankEndEvent)]

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.of_reranking()]


class CallbackRecorder(BaseCallbackHandler):
    """Records the start and end of all callback events of one type."""

    def __init__(self, event_type: CBEventType = CBEventType.RERANKING) -> None:
        super().__init__([], [])
        self.event_type = event_type
        self.calls: list[tuple[str, str, dict[str, Any]]] = []

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        parent_id: str = "",
        **kwargs: Any,
    ) -> str:
        if event_type == self.event_type:
            self.calls.append(("start", event_id, payload or {}))
        return event_id

    def on_event_end(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str = "",
        **kwargs: Any,
    ) -> None:
        if event_type == self.event_type:
            self.calls.append(("end", event_id, payload or {}))

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(
        self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None
    ) -> None: ...


class LockedCallbackRecorder(CallbackRecorder):
    """A handler that cannot be pickled, like a handler with a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class FixedRetriever(BaseRetriever):
    """Returns the same nodes for every query."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


class Postprocess(Protocol):
    def __call__(
        self, postprocessor: BGERerankPostprocessor, nodes: Any, query: Any = ...
    ) -> Awaitable[list[NodeWithScore]]: ...


@pytest.fixture(params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    """Run a test with the sync and with the async methods."""
    return str(request.param)


@pytest.fixture
def postprocess(mode: str) -> Postprocess:
    """Return `postprocess_nodes` or `apostprocess_nodes`."""

    async def run(
        postprocessor: BGERerankPostprocessor, nodes: Any, query: Any = QUERY
    ) -> list[NodeWithScore]:
        bundle = None if query is None else QueryBundle(query)
        if mode == "sync":
            return postprocessor.postprocess_nodes(nodes, bundle)
        return await postprocessor.apostprocess_nodes(nodes, bundle)

    return run


@pytest.fixture
def events() -> Iterator[EventRecorder]:
    """Return a recorder of all instrumentation events of the test."""
    root, recorder = get_dispatcher(), EventRecorder()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    """Return a recorder of all spans of the test."""
    root, handler = get_dispatcher(), SimpleSpanHandler()
    root.add_span_handler(handler)
    yield handler
    root.span_handlers.remove(handler)


@pytest.fixture
def postprocessor(checkpoint: Path) -> BGERerankPostprocessor:
    """Return a postprocessor with the shared scorer of the small checkpoint, already loaded."""
    postprocessor = BGERerankPostprocessor(model=str(checkpoint), device="cpu", dtype="float32")
    postprocessor.resolve_scorer()
    return postprocessor


def found(texts: Sequence[str] = (TEA, PANDA, BEAR)) -> list[NodeWithScore]:
    """Return retrieved nodes with retrieval scores. They are not in the order of their reranking scores."""
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"id-{index}",
                text=text,
                metadata={"title": f"title {index}", "nested": {"tags": [index]}},
                excluded_embed_metadata_keys=["title", "nested"],
                excluded_llm_metadata_keys=["nested"],
            ),
            score=0.75 - index / 4,
        )
        for index, text in enumerate(texts)
    ]


def contents(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.node.get_content() for node in nodes]


# --- what is returned --------------------------------------------------------------------------------


async def test_nodes_come_back_best_first_with_their_score(postprocess: Postprocess) -> None:
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer()), found())
    assert [(node.text, node.score) for node in returned] == [(PANDA, 0.9), (BEAR, 0.5), (TEA, 0.1)]


@pytest.mark.parametrize("keep_retrieval_score", [False, True])
async def test_nodes_of_the_caller_do_not_change(
    postprocess: Postprocess, keep_retrieval_score: bool
) -> None:
    given = found()
    before, inner = copy.deepcopy(given), [node.node for node in given]
    returned = await postprocess(
        BGERerankPostprocessor(scorer=TableScorer(), keep_retrieval_score=keep_retrieval_score), given
    )
    assert not any(new is old for new in returned for old in given)
    for node in returned:
        node.score = 0.0
    assert given == before
    assert all(node.node is same for node, same in zip(given, inner, strict=True))


async def test_returned_nodes_are_the_same_but_for_their_score(postprocess: Postprocess) -> None:
    given = found()
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer()), given)
    assert [node.node for node in returned] == [given[1].node, given[2].node, given[0].node]


@pytest.mark.parametrize(
    "node",
    [
        TextNode(text=PANDA, metadata={"a": 1}, start_char_idx=3),
        ImageNode(text=PANDA, image_url="http://localhost/panda.png"),
        Node.model_validate({"text_resource": {"text": PANDA}}),
    ],
    ids=lambda node: type(node).__name__,
)
async def test_nodes_keep_their_type_and_fields(postprocess: Postprocess, node: Any) -> None:
    options: dict[str, Any] = {"metadata_mode": MetadataMode.NONE, "scorer": TableScorer()}
    (plain,) = await postprocess(BGERerankPostprocessor(**options), [NodeWithScore(node=node)])
    assert (type(plain.node), plain.node, plain.score) == (type(node), node, 0.9)
    (kept,) = await postprocess(
        BGERerankPostprocessor(keep_retrieval_score=True, **options), [NodeWithScore(node=node)]
    )
    changed = {"metadata", "excluded_embed_metadata_keys", "excluded_llm_metadata_keys"}
    assert type(kept.node) is type(node)
    assert kept.node.model_dump(exclude=changed) == node.model_dump(exclude=changed)


async def test_scores_are_python_floats(
    postprocess: Postprocess, postprocessor: BGERerankPostprocessor
) -> None:
    returned = await postprocess(postprocessor, found())
    assert [type(node.score) for node in returned] == [float] * 3
    json.dumps([node.to_dict() for node in returned])


async def test_scores_are_normalized_unless_told_otherwise(
    postprocess: Postprocess, postprocessor: BGERerankPostprocessor, checkpoint: Path, scorer: Scorer
) -> None:
    pairs = [(QUERY, text) for text in BEST_FIRST]
    raw = BGERerankPostprocessor(model=str(checkpoint), device="cpu", dtype="float32", normalize=False)
    for each, expected in (
        (raw, scorer.score(pairs)),
        (postprocessor, scorer.compute_score(pairs, normalize=True)),
    ):
        by_text = {node.text: node.score for node in await postprocess(each, found())}
        assert [by_text[text] for text in BEST_FIRST] == pytest.approx(expected, abs=TOLERANCE)
    assert all(0 < score < 1 for score in scorer.compute_score(pairs, normalize=True))
    assert not all(0 < score < 1 for score in scorer.score(pairs))


@pytest.mark.parametrize("mode_of_text", [MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE])
async def test_retrieval_score_is_kept_where_no_text_shows_it(
    postprocess: Postprocess, mode_of_text: MetadataMode
) -> None:
    given = found()
    returned = await postprocess(
        BGERerankPostprocessor(scorer=TableScorer(), keep_retrieval_score=True), given
    )
    for node, original, rank in zip(returned, (given[1], given[2], given[0]), (1, 2, 0), strict=True):
        assert node.node is not original.node
        assert node.metadata == {
            **original.metadata,
            "retrieval_score": original.score,
            "retrieval_rank": rank,
        }
        assert node.get_content(mode_of_text) == original.get_content(mode_of_text)
        for key in ("retrieval_score", "retrieval_rank"):
            assert key in node.node.excluded_embed_metadata_keys
            assert key in node.node.excluded_llm_metadata_keys


async def test_retrieval_score_is_not_kept_unasked(postprocess: Postprocess) -> None:
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer()), found())
    assert not any("retrieval_score" in node.metadata for node in returned)
    assert not any("retrieval_rank" in node.metadata for node in returned)


async def test_a_second_reranker_scores_the_same_text_as_the_first(postprocess: Postprocess) -> None:
    first, second = TableScorer(), TableScorer()
    options: dict[str, Any] = {"keep_retrieval_score": True}
    once = await postprocess(BGERerankPostprocessor(scorer=first, **options), found())
    twice = await postprocess(BGERerankPostprocessor(scorer=second, **options), once)
    assert sorted(second.asked[0][1]) == sorted(first.asked[0][1])
    for node in twice:
        excluded = node.node.excluded_embed_metadata_keys
        assert len(excluded) == len(set(excluded))


@pytest.mark.parametrize("mode_value", list(MetadataMode))
async def test_a_second_call_scores_the_same_text_in_every_metadata_mode(
    postprocess: Postprocess, mode_value: MetadataMode
) -> None:
    scorer = TableScorer()
    reranker = BGERerankPostprocessor(scorer=scorer, metadata_mode=mode_value, keep_retrieval_score=True)
    nodes = [NodeWithScore(node=TextNode(text=text, metadata={"page": 1}), score=0.5) for text in BEST_FIRST]
    nodes.append(NodeWithScore(node=TextNode(text=" "), score=0.5))
    first = await postprocess(reranker, nodes)
    await postprocess(reranker, first)
    (_, before), (_, after) = scorer.asked
    assert after == before  # `BEST_FIRST` is already sorted


async def test_a_retrieval_score_of_an_earlier_call_is_removed(postprocess: Postprocess) -> None:
    reranker = BGERerankPostprocessor(scorer=TableScorer(), keep_retrieval_score=True)
    first = await postprocess(reranker, [NodeWithScore(node=TextNode(text=PANDA), score=0.5)])
    first[0].score = None
    (second,) = await postprocess(reranker, first)
    assert second.node.metadata == {"retrieval_rank": 0}


def test_a_query_string_in_the_place_of_a_bundle_is_refused() -> None:
    reranker = BGERerankPostprocessor(scorer=TableScorer())
    with pytest.raises(InputTypeError, match=r"query_bundle must be a QueryBundle, not str; .*query_str="):
        reranker.postprocess_nodes(found(), "a query")  # type: ignore[arg-type]


@pytest.mark.parametrize("manager", [None, 5])
def test_a_wrong_callback_manager_is_refused(manager: Any) -> None:
    with pytest.raises(ValidationError, match="callback_manager must be a CallbackManager"):
        BGERerankPostprocessor(model="embedded", callback_manager=manager)
    reranker = BGERerankPostprocessor(model="embedded")
    with pytest.raises(ValidationError, match="callback_manager must be a CallbackManager"):
        reranker.callback_manager = manager


@pytest.mark.parametrize(("top_n", "expected"), [(None, 3), (0, 0), (1, 1), (2, 2), (10, 3)])
async def test_top_n(postprocess: Postprocess, top_n: int | None, expected: int) -> None:
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer(), top_n=top_n), found())
    assert contents(returned) == BEST_FIRST[:expected]


@pytest.mark.parametrize("top_n", [-1, True, 2.0, "2"])
def test_top_n_must_be_a_non_negative_integer(top_n: Any) -> None:
    with pytest.raises(ValidationError, match="top_n"):
        BGERerankPostprocessor(top_n=top_n)


@pytest.mark.parametrize(
    ("threshold", "top_n", "expected"),
    [(None, None, 3), (0.5, None, 2), (0.5000001, None, 1), (0.1, 2, 2), (0.95, None, 0), (-1.0, 0, 0)],
)
async def test_threshold_is_inclusive(
    postprocess: Postprocess, threshold: float | None, top_n: int | None, expected: int
) -> None:
    postprocessor = BGERerankPostprocessor(scorer=TableScorer(), score_threshold=threshold, top_n=top_n)
    assert contents(await postprocess(postprocessor, found())) == BEST_FIRST[:expected]


async def test_equal_scores_keep_retrieval_order(
    postprocess: Postprocess, postprocessor: BGERerankPostprocessor
) -> None:
    nodes = [NodeWithScore(node=TextNode(id_=str(i), text=PANDA), score=i / 20) for i in range(20)]
    nodes.append(NodeWithScore(node=TextNode(id_="other", text=TEA)))
    order = [node.node_id for node in await postprocess(postprocessor, nodes)]
    assert [node_id for node_id in order if node_id != "other"] == [str(index) for index in range(20)]


async def test_nodes_with_equal_ids_are_ranked_separately(postprocess: Postprocess) -> None:
    nodes = [NodeWithScore(node=TextNode(id_="same", text=text)) for text in (TEA, PANDA, BEAR, PANDA)]
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer()), nodes)
    assert [(node.text, node.score) for node in returned] == [
        (PANDA, 0.9),
        (PANDA, 0.9),
        (BEAR, 0.5),
        (TEA, 0.1),
    ]


async def test_one_node_found_twice_is_returned_twice(postprocess: Postprocess) -> None:
    node = NodeWithScore(node=TextNode(text=PANDA), score=0.3)
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer()), [node, node])
    assert [each.score for each in returned] == [0.9, 0.9]
    assert returned[0] is not returned[1]
    assert node.score == 0.3


# --- what is scored ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata_mode", "scored"),
    [
        (MetadataMode.ALL, "both: 1\nembed: 2\nllm: 3\n\nt"),
        (MetadataMode.EMBED, "both: 1\nembed: 2\n\nt"),
        (MetadataMode.LLM, "both: 1\nllm: 3\n\nt"),
        (MetadataMode.NONE, "t"),
        (None, "both: 1\nembed: 2\n\nt"),
    ],
)
async def test_metadata_mode_decides_the_text(
    postprocess: Postprocess, metadata_mode: MetadataMode | None, scored: str
) -> None:
    scorer = TableScorer()
    node = TextNode(
        text="t",
        metadata={"both": "1", "embed": "2", "llm": "3"},
        excluded_embed_metadata_keys=["llm"],
        excluded_llm_metadata_keys=["embed"],
    )
    options: dict[str, Any] = {} if metadata_mode is None else {"metadata_mode": metadata_mode}
    await postprocess(BGERerankPostprocessor(scorer=scorer, **options), [NodeWithScore(node=node)])
    assert scorer.asked == [(QUERY, [scored])]


async def test_a_query_string_is_taken_as_well(mode: str) -> None:
    scorer = TableScorer()
    postprocessor = BGERerankPostprocessor(scorer=scorer)
    if mode == "sync":
        returned = postprocessor.postprocess_nodes(found(), query_str=QUERY)
    else:
        returned = await postprocessor.apostprocess_nodes(found(), query_str=QUERY)
    assert contents(returned) == BEST_FIRST
    assert scorer.asked[0][0] == QUERY


@pytest.mark.parametrize("given", [found(), []], ids=["nodes", "empty"])
async def test_a_missing_query_raises_the_error_of_llama_index(
    postprocess: Postprocess, events: EventRecorder, given: list[NodeWithScore]
) -> None:
    recorder = CallbackRecorder()
    postprocessor = BGERerankPostprocessor(scorer=TableScorer(), callback_manager=CallbackManager([recorder]))
    with pytest.raises(ValueError, match=r"^Missing query bundle in extra info\.$"):
        await postprocess(postprocessor, given, query=None)
    assert (events.kinds(), recorder.calls) == ([], [])


@pytest.mark.parametrize(
    ("nodes", "query", "message"),
    [
        (
            [*found(), TextNode(text=PANDA)],
            QUERY,
            "node 3 must be a NodeWithScore, not llama_index.core.schema.TextNode",
        ),
        ([*found(), PANDA], QUERY, "node 3 must be a NodeWithScore, not str"),
        (found(), " \n", "the query is blank"),
        (found(), 3, "the query must be a string, not int"),
    ],
)
async def test_invalid_input_emits_no_events(
    postprocess: Postprocess, events: EventRecorder, nodes: Any, query: Any, message: str
) -> None:
    recorder, scorer = CallbackRecorder(), TableScorer()
    postprocessor = BGERerankPostprocessor(scorer=scorer, callback_manager=CallbackManager([recorder]))
    with pytest.raises(InputError, match=message) as caught:
        await postprocess(postprocessor, nodes, query)
    assert (events.kinds(), recorder.calls, scorer.asked) == ([], [], [])
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "blank",
    [TextNode(text=""), TextNode(text=" \n\t"), Node(), ImageNode(image_url="http://localhost/a.png")],
    ids=["empty", "white space", "no resource", "image"],
)
async def test_a_node_without_text_comes_last(
    postprocess: Postprocess, postprocessor: BGERerankPostprocessor, blank: Any
) -> None:
    given = [NodeWithScore(node=blank, score=0.5), *found([PANDA, TEA])]
    before = copy.deepcopy(given)
    returned = await postprocess(postprocessor, given)
    assert given == before
    assert {node.node_id for node in returned[:2]} == {"id-0", "id-1"}
    assert (returned[2].node_id, returned[2].score) == (blank.node_id, 0.0)
    assert returned[2].metadata == {**blank.metadata, "rerank_blank": True}
    assert all("rerank_blank" not in node.metadata for node in returned[:2])
    refusing = BGERerankPostprocessor(
        model=postprocessor.model, device="cpu", dtype="float32", blank_passages="refuse"
    )
    with pytest.raises(InputError, match="passage 0 is blank") as caught:
        await postprocess(refusing, given)
    assert caught.value.index == 0


async def test_metadata_alone_is_scored_if_the_mode_includes_it(
    postprocess: Postprocess, postprocessor: BGERerankPostprocessor
) -> None:
    nodes = [NodeWithScore(node=TextNode(text="", metadata={"title": "Pandas"}))]
    scorer = TableScorer()
    await postprocess(BGERerankPostprocessor(scorer=scorer), nodes)
    assert scorer.asked == [(QUERY, ["title: Pandas"])]
    (returned,) = await postprocess(postprocessor, nodes)
    assert "rerank_blank" not in returned.metadata
    (returned,) = await postprocess(
        BGERerankPostprocessor(
            model=postprocessor.model, device="cpu", dtype="float32", metadata_mode=MetadataMode.NONE, top_n=1
        ),
        nodes,
    )
    assert returned.metadata["rerank_blank"]


async def test_marks_of_unread_nodes_are_hidden_from_prompts(
    postprocess: Postprocess, postprocessor: BGERerankPostprocessor
) -> None:
    given = found([PANDA, "bamboo " * 2000, ""])
    before = copy.deepcopy(given)
    returned = await postprocess(postprocessor, given)
    by_id = {node.node_id: node.node for node in returned}
    assert {name: node.metadata.get("rerank_truncated") for name, node in by_id.items()} == {
        "id-0": None,
        "id-1": True,
        "id-2": None,
    }
    for node in by_id.values():
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert "rerank_" not in node.get_content(mode)
    assert given == before
    again = await postprocess(postprocessor, returned)
    assert [(node.node_id, node.metadata) for node in again] == [
        (node.node_id, node.metadata) for node in returned
    ]


# --- events, callbacks, spans ------------------------------------------------------------------------


@pytest.mark.parametrize(("top_n", "shown"), [(None, 3), (2, 2), (0, 0), (7, 7)])
async def test_events_contain_the_call_and_its_result(
    postprocess: Postprocess, events: EventRecorder, top_n: int | None, shown: int
) -> None:
    given = found()
    returned = await postprocess(BGERerankPostprocessor(scorer=TableScorer(), top_n=top_n), given)
    start, end = events.of_reranking()
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert start.query == QueryBundle(QUERY)
    assert (start.top_n, start.model_name) == (shown, "TableScorer")
    assert start.nodes == given
    assert [node.score for node in start.nodes] == [0.75, 0.5, 0.25]
    assert end.nodes == returned
    assert start.timestamp <= end.timestamp


async def test_events_name_the_model(
    postprocess: Postprocess,
    events: EventRecorder,
    postprocessor: BGERerankPostprocessor,
    scorer: Scorer,
    checkpoint: Path,
) -> None:
    await postprocess(postprocessor, found())
    await postprocess(BGERerankPostprocessor(scorer=scorer), found())
    names = [event.model_name for event in events.of_reranking() if isinstance(event, ReRankStartEvent)]
    assert names == [str(checkpoint)] * 2


async def test_empty_input_emits_both_events_without_scoring(
    postprocess: Postprocess, events: EventRecorder
) -> None:
    recorder = CallbackRecorder()
    postprocessor = BGERerankPostprocessor(
        scorer=BrokenScorer(), callback_manager=CallbackManager([recorder])
    )
    assert await postprocess(postprocessor, []) == []
    start, end = events.of_reranking()
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert (start.nodes, start.top_n, end.nodes) == ([], 0, [])
    assert [kind for kind, _, _ in recorder.calls] == ["start", "end"]


async def test_a_scoring_error_emits_the_end_event_and_reaches_the_caller(
    postprocess: Postprocess, events: EventRecorder
) -> None:
    recorder = CallbackRecorder()
    postprocessor = BGERerankPostprocessor(
        scorer=BrokenScorer(), callback_manager=CallbackManager([recorder])
    )
    with pytest.raises(RuntimeError, match="the device is on fire") as caught:
        await postprocess(postprocessor, found())
    start, end = events.of_reranking()
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert end.nodes == []
    (_, started, _), (_, ended, payload) = recorder.calls
    assert started == ended
    assert payload == {EventPayload.EXCEPTION: caught.value}


async def test_a_cancelled_call_emits_the_end_event(events: EventRecorder, spans: SimpleSpanHandler) -> None:
    recorder, scorer = CallbackRecorder(), StuckScorer()
    postprocessor = BGERerankPostprocessor(scorer=scorer, callback_manager=CallbackManager([recorder]))
    task = asyncio.create_task(postprocessor.apostprocess_nodes(found(), query_str=QUERY))
    await scorer.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events.kinds() == ["ReRankStartEvent", "ReRankEndEvent"]
    assert [kind for kind, _, _ in recorder.calls] == ["start", "end"]
    assert span_names(spans.dropped_spans) == ["BGERerankPostprocessor._apostprocess_nodes"]


async def test_concurrent_calls_emit_their_own_events(events: EventRecorder) -> None:
    postprocessor = BGERerankPostprocessor(scorer=TableScorer())
    await asyncio.gather(*(postprocessor.apostprocess_nodes(found(), query_str=str(i)) for i in range(9)))
    by_span: dict[str | None, list[str]] = {}
    for event in events.of_reranking():
        by_span.setdefault(event.span_id, []).append(type(event).__name__)
    assert list(by_span.values()) == [["ReRankStartEvent", "ReRankEndEvent"]] * 9


@pytest.mark.parametrize(("top_n", "shown"), [(None, 3), (2, 2)])
async def test_callback_has_the_usual_payload(
    postprocess: Postprocess, top_n: int | None, shown: int
) -> None:
    recorder = CallbackRecorder()
    postprocessor = BGERerankPostprocessor(
        scorer=TableScorer(), top_n=top_n, callback_manager=CallbackManager([recorder])
    )
    given = found()
    returned = await postprocess(postprocessor, given)
    (first, started, start), (second, ended, end) = recorder.calls
    assert (first, second, started) == ("start", "end", ended)
    assert start == {
        EventPayload.NODES: given,
        EventPayload.MODEL_NAME: "TableScorer",
        EventPayload.QUERY_STR: QUERY,
        EventPayload.TOP_K: shown,
    }
    assert end == {
        EventPayload.NODES: returned,
        EventPayload.ADDITIONAL_KWARGS: {
            "num_pairs": 3,
            "num_tokens": None,
            "num_truncated": None,
            "num_truncated_queries": None,
            "num_blank": None,
            "num_returned": len(returned),
        },
    }


def span_names(spans: Sequence[Any]) -> list[str]:
    return [span.id_.split("-")[0] for span in spans]


async def test_each_call_is_one_span(
    postprocess: Postprocess, mode: str, spans: SimpleSpanHandler, events: EventRecorder
) -> None:
    await postprocess(BGERerankPostprocessor(scorer=TableScorer()), found())
    method = "_postprocess_nodes" if mode == "sync" else "_apostprocess_nodes"
    assert span_names(spans.completed_spans) == [f"BGERerankPostprocessor.{method}"]
    (span,) = spans.completed_spans
    assert [event.span_id for event in events.of_reranking()] == [span.id_] * 2
    assert (spans.open_spans, spans.dropped_spans) == ({}, [])


async def test_a_failed_call_drops_its_span(postprocess: Postprocess, spans: SimpleSpanHandler) -> None:
    with pytest.raises(RuntimeError):
        await postprocess(BGERerankPostprocessor(scorer=BrokenScorer()), found())
    assert len(spans.dropped_spans) == 1
    assert (spans.open_spans, spans.completed_spans) == ({}, [])


# --- options, dumps and copies -----------------------------------------------------------------------

ALL_OPTIONS: dict[str, Any] = {
    "model": "BAAI/bge-reranker-v2-m3",
    "revision": "main",
    "sha256": "0" * 64,
    "cache_folder": "cache",
    "local_files_only": True,
    "devices": ("cuda:0", "cuda:1"),
    "dtype": "bfloat16",
    "max_length": 1024,
    "query_max_length": 128,
    "query_truncation_side": "left",
    "max_batch_tokens": 4096,
    "num_threads": 1,
    "capture_graphs": False,
    "max_wait_ms": 2.5,
    "max_queued_tokens": 100_000,
    "query_instruction": "query: ",
    "passage_instruction": "passage: ",
    "long_passages": "windows",
    "window_overlap_tokens": 32,
    "blank_passages": "refuse",
    "top_n": 7,
    "score_threshold": 0.25,
    "normalize": False,
    "keep_retrieval_score": True,
    "mark_unread": False,
    "timeout": 1.5,
    "metadata_mode": MetadataMode.LLM,
}


def test_the_tested_options_are_complete() -> None:
    """`device` is missing, because it cannot be combined with `devices`."""
    others = {"device", "scorer", "callback_manager"}
    assert set(ALL_OPTIONS) == set(BGERerankPostprocessor.model_fields) - others
    defaults = BGERerankPostprocessor()
    assert not [name for name, value in ALL_OPTIONS.items() if value == getattr(defaults, name)]


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["defaults", "all"])
def test_dictionaries_and_json_lose_nothing(options: dict[str, Any]) -> None:
    postprocessor = BGERerankPostprocessor(**options)
    data = postprocessor.to_dict()
    assert data == json.loads(json.dumps(data))
    assert {type(value) for value in data.values()} <= {str, int, float, bool, list, NoneType}
    assert data["class_name"] == "BGERerankPostprocessor"
    for copied in (
        BGERerankPostprocessor.from_dict(data),
        BGERerankPostprocessor.from_dict(json.loads(json.dumps(data))),
        BGERerankPostprocessor.from_json(postprocessor.to_json()),
        pickle.loads(pickle.dumps(postprocessor)),
        copy.deepcopy(postprocessor),
    ):
        assert copied.to_dict() == data
        assert copied.metadata_mode is postprocessor.metadata_mode
        assert copied.scorer_config() == postprocessor.scorer_config()
        for name, value in options.items():
            assert getattr(copied, name) == value


@pytest.mark.parametrize("metadata_mode", list(MetadataMode))
def test_every_metadata_mode_survives_json(metadata_mode: MetadataMode) -> None:
    copied = BGERerankPostprocessor.from_json(BGERerankPostprocessor(metadata_mode=metadata_mode).to_json())
    assert copied.metadata_mode is metadata_mode


def test_from_dict_takes_overrides_and_leaves_its_argument_alone() -> None:
    data = BGERerankPostprocessor(top_n=3).to_dict()
    before = dict(data)
    assert BGERerankPostprocessor.from_dict(data, top_n=1).top_n == 1
    assert data == before


@pytest.mark.parametrize(
    "options",
    [
        {"topn": TEA},
        {"top_k": 3},
        {"use_fp16": True},
        {"top_n": [TEA]},
        {"metadata_mode": TEA},
        {"scorer": TEA},
        {"model": found()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_invalid_options_are_refused_without_showing_them(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        BGERerankPostprocessor(**options)
    assert next(iter(options)) in str(caught.value)
    assert "CANARY" not in str(caught.value)
    with pytest.raises(ValidationError):
        BGERerankPostprocessor.from_dict({**BGERerankPostprocessor().to_dict(), **options})


def test_settings_cannot_be_combined_with_a_scorer() -> None:
    with pytest.raises(ValidationError, match=r"\['dtype'\] cannot be combined with scorer"):
        BGERerankPostprocessor(scorer=TableScorer(), dtype="bfloat16")


@pytest.mark.parametrize(("name", "bad"), [("top_n", -1), ("max_length", 3), ("metadata_mode", "x")])
def test_a_wrong_assignment_is_refused_and_undone(name: str, bad: Any) -> None:
    postprocessor = BGERerankPostprocessor(top_n=3)
    before = postprocessor.to_dict()
    with pytest.raises(ValidationError):
        setattr(postprocessor, name, bad)
    assert postprocessor.to_dict() == before


def test_json_schema_describes_the_options() -> None:
    schema = BGERerankPostprocessor.model_json_schema()
    assert {"model", "top_n", "score_threshold", "metadata_mode"} <= set(schema["properties"])
    json.dumps(schema)


async def test_callback_manager_can_be_bound_again(postprocess: Postprocess) -> None:
    first, second = CallbackRecorder(), CallbackRecorder()
    postprocessor = BGERerankPostprocessor(scorer=TableScorer(), callback_manager=CallbackManager([first]))
    manager = CallbackManager([second])
    postprocessor.callback_manager = manager
    assert postprocessor.callback_manager is manager
    await postprocess(postprocessor, found())
    assert (len(first.calls), len(second.calls)) == (0, 2)


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "model_copy"])
def test_copies_hold_no_weights_and_share_the_scorer(
    copier: str, postprocessor: BGERerankPostprocessor, checkpoint: Path
) -> None:
    postprocessor.postprocess_nodes(found(), query_str=QUERY)
    data = pickle.dumps(postprocessor)
    assert len(data) < 4096 < (checkpoint / "model.safetensors").stat().st_size
    copiers: dict[str, Callable[[], BGERerankPostprocessor]] = {
        "pickle": lambda: pickle.loads(data),
        "deepcopy": lambda: copy.deepcopy(postprocessor),
        "model_copy": lambda: postprocessor.model_copy(deep=True),
    }
    copied = copiers[copier]()
    assert copied is not postprocessor
    assert copied.to_dict() == postprocessor.to_dict()
    assert copied.resolve_scorer() is postprocessor.resolve_scorer()


def test_copies_of_a_postprocessor_with_its_own_scorer(scorer: Scorer) -> None:
    postprocessor = BGERerankPostprocessor(scorer=scorer, top_n=2)
    assert copy.deepcopy(postprocessor).scorer is scorer
    data = pickle.dumps(postprocessor)
    assert len(data) < 4096
    unpickled: BGERerankPostprocessor = pickle.loads(data)
    assert isinstance(unpickled.scorer, Scorer)
    assert unpickled.scorer.config == scorer.config
    assert unpickled.top_n == 2


def test_a_pickle_contains_a_picklable_scorer() -> None:
    unpickled = pickle.loads(pickle.dumps(BGERerankPostprocessor(scorer=TableScorer())))
    assert isinstance(unpickled.scorer, TableScorer)
    assert contents(unpickled.postprocess_nodes(found(), query_str=QUERY)) == BEST_FIRST


def test_an_unpicklable_scorer_refuses_instead_of_becoming_another_model() -> None:
    scorer = UnpicklableScorer()
    postprocessor = BGERerankPostprocessor(scorer=scorer)
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(postprocessor)
    assert postprocessor.scorer is scorer, "the failed attempt changed the postprocessor"
    assert contents(postprocessor.postprocess_nodes(found(), query_str=QUERY)) == BEST_FIRST


def test_pickling_leaves_the_callback_manager_alone() -> None:
    recorder = LockedCallbackRecorder()
    postprocessor = BGERerankPostprocessor(scorer=TableScorer(), callback_manager=CallbackManager([recorder]))
    unpickled = pickle.loads(pickle.dumps(postprocessor))
    for each in (unpickled, postprocessor):
        assert contents(each.postprocess_nodes(found(), query_str=QUERY)) == BEST_FIRST
    assert len(recorder.calls) == 2


def test_secrets_are_not_shown_anywhere(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_SECRET")
    postprocessor = BGERerankPostprocessor(
        model=str(checkpoint), device="cpu", dtype="float32", max_batch_tokens=7003
    )
    try:
        postprocessor.postprocess_nodes(found(), query_str=QUERY)
        for seen in (
            repr(postprocessor),
            str(postprocessor),
            postprocessor.to_json(),
            repr(pickle.dumps(postprocessor)),
            repr(vars(postprocessor)),
        ):
            assert "hf_SECRET" not in seen
    finally:
        Scorer.shared(postprocessor.scorer_config()).close()


# --- inside other parts of LlamaIndex ----------------------------------------------------------------


async def test_query_engine(mode: str, events: EventRecorder) -> None:
    recorder = CallbackRecorder()
    given = found()
    before = copy.deepcopy(given)
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(given),
        llm=MockLLM(),
        node_postprocessors=[
            BGERerankPostprocessor(scorer=TableScorer(), top_n=2, keep_retrieval_score=True)
        ],
        callback_manager=CallbackManager([recorder]),
    )
    response = engine.query(QUERY) if mode == "sync" else await engine.aquery(QUERY)
    assert [(node.text, node.score) for node in response.source_nodes] == [(PANDA, 0.9), (BEAR, 0.5)]
    prompt = str(response)  # the answer of MockLLM is its prompt
    assert prompt.index(PANDA) < prompt.index(BEAR)
    assert TEA not in prompt
    assert "retrieval_" not in prompt
    assert events.kinds() == ["ReRankStartEvent", "ReRankEndEvent"]
    assert [kind for kind, _, _ in recorder.calls] == ["start", "end"]
    assert given == before


async def test_query_engine_of_an_index(mode: str, postprocessor: BGERerankPostprocessor) -> None:
    index = VectorStoreIndex(
        nodes=[TextNode(text=text) for text in BEST_FIRST], embed_model=MockEmbedding(embed_dim=4)
    )
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=3, node_postprocessors=[postprocessor, SimilarityPostprocessor()]
    )
    response = engine.query(QUERY) if mode == "sync" else await engine.aquery(QUERY)
    scores = [node.score for node in response.source_nodes]
    assert sorted(node.text for node in response.source_nodes) == sorted(BEST_FIRST)
    assert scores == sorted(scores, key=lambda score: -(score or 0.0))


async def test_query_engine_passes_an_error_on(mode: str) -> None:
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(found()),
        llm=MockLLM(),
        node_postprocessors=[BGERerankPostprocessor(scorer=BrokenScorer())],
    )
    with pytest.raises(RuntimeError, match="the device is on fire"):
        _ = engine.query(QUERY) if mode == "sync" else await engine.aquery(QUERY)


@pytest.mark.parametrize("engine_type", [ContextChatEngine, CondensePlusContextChatEngine])
@pytest.mark.parametrize("streaming", [False, True])
async def test_chat_engine(
    engine_type: type[ContextChatEngine] | type[CondensePlusContextChatEngine],
    streaming: bool,
    mode: str,
    events: EventRecorder,
) -> None:
    engine = engine_type.from_defaults(
        retriever=FixedRetriever(found()),
        llm=MockLLM(),
        node_postprocessors=[BGERerankPostprocessor(scorer=TableScorer(), top_n=2)],
    )
    if mode == "sync":
        response: Any = engine.stream_chat(QUERY) if streaming else engine.chat(QUERY)
        said = "".join(response.response_gen) if streaming else str(response)
    else:
        response = await (engine.astream_chat(QUERY) if streaming else engine.achat(QUERY))
        tokens = [token async for token in response.async_response_gen()] if streaming else [str(response)]
        said = "".join(tokens)
    assert contents(response.source_nodes) == [PANDA, BEAR]
    assert said.index(PANDA) < said.index(BEAR)
    assert TEA not in said
    assert events.kinds() == ["ReRankStartEvent", "ReRankEndEvent"]
