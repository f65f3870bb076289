"""Values in documents, nodes and options: missing values, wrong types and shared objects."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import (
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, ScorerConfig
from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.errors import ConfigError, InputError, InputTypeError
from tests.support.scorers import PANDA, TEA, TableScorer

QUERY = "what does a panda eat?"
NAN = float("nan")


class Section(Document):
    """A user-defined document type, with a field that can be edited in place."""

    tags: list[str] = Field(default_factory=list)


# --- missing values are not scored --------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, NAN])
@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({"rank_fields": ["title", "year"]}, "year: 2016\nt"),
        ({"document_template": "{title}|{year}|{page_content}"}, "|2016|t"),
        ({"document_template": "{title!r}|{title:>9}|{title:d}|{page_content}"}, "|||t"),
    ],
)
def test_missing_fields_of_a_document_are_not_scored(
    missing: Any, options: dict[str, Any], scored: str
) -> None:
    scorer = TableScorer()
    document = Document(page_content="t", metadata={"title": missing, "year": 2016})
    BGEReranker(scorer=scorer, **options).compress_documents([document], QUERY)
    assert scorer.asked == [(QUERY, [scored])]


@pytest.mark.parametrize("missing", [None, NAN])
@pytest.mark.parametrize("rank_fields", [None, ["title", "text"]])
def test_missing_fields_of_a_mapping_are_not_scored(missing: Any, rank_fields: list[str] | None) -> None:
    scorer = TableScorer()
    reranker = BGEReranker(scorer=scorer)
    reranker.rerank([{"title": missing, "text": "t"}], QUERY, rank_fields=rank_fields)
    assert scorer.asked == [(QUERY, ["text: t"])]


@pytest.mark.parametrize("value", [0, False, "", "None", 0.0])
def test_falsy_values_are_scored(value: Any) -> None:
    scorer = TableScorer()
    BGEReranker(scorer=scorer).rerank([{"title": value}], QUERY)
    assert scorer.asked == [(QUERY, [f"title: {value}"])]


# --- values of the wrong type ------------------------------------------------------------------------


def with_value(name: str, value: Any) -> Document:
    document = Document(page_content="TEXT-CANARY", metadata={"a": "METADATA-CANARY"})
    setattr(document, name, value)  # pydantic does not check this
    return document


@pytest.mark.parametrize(
    ("name", "value"),
    [("page_content", None), ("page_content", NAN), ("page_content", b"CANARY"), ("metadata", None), ("metadata", NAN), ("metadata", [("a", "CANARY")])],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"rank_fields": ["a"]}, {"document_template": "{a} {page_content}"}])
async def test_a_document_edited_to_an_invalid_type_is_named_by_index(
    name: str, value: Any, options: dict[str, Any]
) -> None:
    scorer = TableScorer()
    reranker = BGEReranker(scorer=scorer, **options)
    documents = [Document(page_content="a", metadata={"a": 1}), with_value(name, value)]
    calls: list[Callable[[], Any]] = [
        lambda: reranker.compress_documents(documents, QUERY),
        lambda: asyncio.run(reranker.acompress_documents(documents, QUERY)),
        lambda: reranker.rerank(documents, QUERY),
        lambda: reranker.rerank_many([(QUERY, []), (QUERY, documents)]),
    ]
    for call in calls:
        with pytest.raises(
            InputTypeError, match=f"{name} of document 1 must be .*{type(value).__name__}"
        ) as e:
            await asyncio.to_thread(call)
        assert e.value.index == 1
        assert "CANARY" not in str(e.value)
    assert scorer.asked == []


def changed(node: Any, name: str, value: Any) -> Any:
    object.__setattr__(node, "__dict__", {**node.__dict__, name: value})  # no validation would accept this
    return node


@pytest.mark.parametrize("mode", list(MetadataMode))
@pytest.mark.parametrize(
    ("node", "message"),
    [
        (changed(TextNode(text="a", metadata={"k": "CANARY"}), "text", None), "text of node 1 .*NoneType"),
        (changed(TextNode(text="a"), "text", NAN), "text of node 1 .*float"),
        (changed(ImageNode(text="a", metadata={"k": "CANARY"}), "text", 3), "text of node 1 .*int"),
        (changed(TextNode(text="CANARY"), "metadata", None), "metadata of node 1 .*NoneType"),
        (changed(TextNode(text="CANARY"), "metadata", NAN), "metadata of node 1 .*float"),
        (
            Node.model_validate(
                {"text_resource": changed(MediaResource(text="a"), "text", NAN), "metadata": {"k": "CANARY"}}
            ),
            "text of node 1 .*float",
        ),
    ],
)
async def test_a_node_edited_to_an_invalid_type_is_named_by_index(
    mode: MetadataMode, node: Any, message: str
) -> None:
    scorer = TableScorer()
    postprocessor = BGERerankPostprocessor(scorer=scorer, metadata_mode=mode)
    nodes = [NodeWithScore(node=TextNode(text="a")), NodeWithScore.model_construct(node=node, score=None)]

    async def call_async() -> list[NodeWithScore]:
        return await postprocessor.apostprocess_nodes(nodes, query_str=QUERY)

    async def call() -> list[NodeWithScore]:
        return postprocessor.postprocess_nodes(nodes, query_str=QUERY)

    calls: list[Callable[[], Awaitable[list[NodeWithScore]]]] = [call, call_async]
    for each in calls:
        with pytest.raises(InputTypeError, match=message) as caught:
            await each()
        assert caught.value.index == 1
        assert "CANARY" not in str(caught.value)
    assert scorer.asked == []


# --- returned objects are independent copies ----------------------------------------------------------


@pytest.mark.parametrize("keep_retrieval_score", [False, True])
def test_editing_returned_documents_does_not_change_the_originals(keep_retrieval_score: bool) -> None:
    documents = [
        Section(page_content=text, metadata={"nested": {"tags": [{"a": 1}]}, "list": [[1]]}, tags=["x"])
        for text in (TEA, PANDA)
    ]
    before = copy.deepcopy(documents)
    returned = BGEReranker(
        scorer=TableScorer(), keep_retrieval_score=keep_retrieval_score
    ).compress_documents(documents, QUERY)
    for document in returned:
        assert isinstance(document, Section)
        document.metadata["nested"]["tags"][0]["a"] = 2
        document.metadata["nested"]["more"] = 1
        document.metadata["list"][0].append(2)
        document.tags.append("y")
    assert documents == before


@pytest.mark.parametrize("keep_retrieval_score", [False, True])
@pytest.mark.parametrize("node_type", [TextNode, Node, ImageNode])
def test_editing_returned_nodes_does_not_change_the_originals(
    keep_retrieval_score: bool, node_type: Any
) -> None:
    related = RelatedNodeInfo(node_id="source", metadata={"nested": {"tags": [1]}})
    nodes = [
        NodeWithScore(
            node=node_type(
                text_resource=MediaResource(text=text),
                metadata={"nested": {"tags": [1]}},
                excluded_embed_metadata_keys=["nested"],
                excluded_llm_metadata_keys=["nested"],
                relationships={NodeRelationship.SOURCE: related},
                embedding=[0.5, 0.25],
            ),
            score=0.5,
        )
        for text in (TEA, PANDA)
    ]
    before = copy.deepcopy(nodes)
    returned = BGERerankPostprocessor(
        scorer=TableScorer(), keep_retrieval_score=keep_retrieval_score
    ).postprocess_nodes(nodes, query_str=QUERY)
    for each in returned:
        node: Any = each.node
        assert node.class_name() == node_type.class_name()
        node.metadata["nested"]["tags"].append(2)
        node.metadata["new"] = 1
        node.excluded_embed_metadata_keys.append("x")
        node.excluded_llm_metadata_keys.append("x")
        node.relationships[NodeRelationship.SOURCE].metadata["nested"]["tags"].append(2)
        node.relationships[NodeRelationship.NEXT] = related
        node.embedding[0] = 0.0
        if node_type is Node:
            node.text_resource.text = "edited"
        else:
            node.text = "edited"
    assert nodes == before


def test_nodes_that_were_not_scored_are_copies_too() -> None:
    nodes = [NodeWithScore(node=TextNode(text=" ", metadata={}), score=0.5)]
    (returned,) = BGERerankPostprocessor(scorer=TableScorer()).postprocess_nodes(nodes, query_str=QUERY)
    returned.node.metadata["new"] = 1
    assert nodes[0].node.metadata == {}


def test_values_that_cannot_be_copied_are_shared_and_the_rest_is_copied() -> None:
    lock = threading.Lock()
    metadata: dict[str, Any] = {"lock": lock, "tags": [1], "nested": {"lock": lock, "tags": [1]}}
    metadata["pages"] = [{"number": 1}, [lock, [1]], ({"number": 2}, lock)]
    metadata["pages"].append(metadata["pages"])
    before = repr(metadata)
    document = Document(page_content=PANDA, metadata=metadata)
    (returned,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    copied = returned.metadata
    pages = copied["pages"]
    assert copied["lock"] is copied["nested"]["lock"] is pages[1][0] is pages[2][1] is lock
    assert pages[3] is pages
    assert pages[:3] == metadata["pages"][:3]
    copied["tags"].append(2)
    copied["nested"]["tags"].append(2)
    pages[0]["number"] = pages[2][0]["number"] = 9
    pages[1][1].append(2)
    pages.append(3)
    assert repr(metadata) == before


def test_values_in_hundreds_of_others_are_whole() -> None:
    """At some depth the original is shared. No copy is empty, even if a value occurs at several depths."""
    values: list[Any] = [["leaf", threading.Lock()]]
    for number in range(1200):
        values.append([values[-1]] if number % 2 else {"in": values[-1]})
    metadata = {str(number): value for number, value in enumerate(values)}
    document = Document(page_content=PANDA, metadata={"deepest": values[-1], **metadata})
    (returned,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    for number in range(len(values)):
        inner = returned.metadata[str(number)]
        for _ in range(number):
            (inner,) = inner.values() if isinstance(inner, dict) else inner
        assert inner == values[0]
    assert returned.metadata["0"] is not values[0]


def test_objects_refer_to_the_same_copies_as_before() -> None:
    class Note:
        def __init__(self, tags: list[Any]) -> None:
            self.tags = tags

    class Broken(dict[str, Any]):
        def __reduce_ex__(self, _: object) -> Any:
            raise TypeError("cannot be copied")

    tags: list[Any] = [[1]]
    element = ElementTree.Element("a", {"b": "c"})  # its `__deepcopy__` is written in C
    metadata = {"tags": tags, "note": Note(tags), "element": element, "broken": Broken(tags=tags)}
    document = Document(page_content=PANDA, metadata=metadata)
    (returned,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    copied = returned.metadata
    assert copied["tags"] is copied["note"].tags is copied["broken"]["tags"]
    assert copied["tags"] is not tags
    assert copied["element"] is not element
    assert copied["element"].attrib == {"b": "c"}
    assert type(copied["broken"]) is dict


def test_a_value_that_occurs_often_is_copied_once() -> None:
    lock = threading.Lock()
    twice: Any = ("leaf", lock)
    for _ in range(60):  # each level doubles the number of paths to the leaf
        twice = (twice, twice)
    tags = [1]
    document = Document(page_content=PANDA, metadata={"twice": twice, "tags": tags, "again": tags})
    (returned,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    assert returned.metadata["twice"][0] is returned.metadata["twice"][1]
    assert returned.metadata["tags"] is returned.metadata["again"]
    assert returned.metadata["tags"] is not tags


class Loose(Document):
    """A document type with fields that it does not declare, and with a private attribute."""

    model_config = ConfigDict(extra="allow")
    _notes: list[int] = PrivateAttr(default_factory=list)


class LooseNode(NodeWithScore):
    """A scored node with a field that it does not declare."""

    model_config = ConfigDict(extra="allow")


def test_undeclared_and_private_values_are_copied_too() -> None:
    document = Loose(page_content=PANDA, extra={"tags": [1]})  # type: ignore[call-arg]
    document._notes.append(1)
    (returned,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    assert isinstance(returned, Loose)
    assert (returned.extra, returned._notes) == ({"tags": [1]}, [1])  # type: ignore[attr-defined]
    returned.extra["tags"].append(2)  # type: ignore[attr-defined]
    returned._notes.append(2)
    assert (document.extra, document._notes) == ({"tags": [1]}, [1])  # type: ignore[attr-defined]
    node = LooseNode(node=TextNode(text=PANDA), tags=[1])  # type: ignore[call-arg]
    (scored,) = BGERerankPostprocessor(scorer=TableScorer()).postprocess_nodes([node], query_str=QUERY)
    scored.tags.append(2)  # type: ignore[attr-defined]
    assert node.tags == [1]  # type: ignore[attr-defined]


def test_metadata_that_contains_itself_is_copied_with_values_that_cannot_be_copied() -> None:
    parent: dict[str, Any] = {"lock": threading.Lock(), "tags": [1]}
    parent["children"] = [{"parent": parent}]
    parent["first"] = {"parent": parent}
    document = Document(page_content=PANDA, metadata={"tree": parent, "again": parent})
    (returned,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    copied = returned.metadata["tree"]
    assert (
        copied is returned.metadata["again"] is copied["first"]["parent"] is copied["children"][0]["parent"]
    )
    assert copied is not parent
    assert copied["lock"] is parent["lock"]
    copied["tags"].append(2)
    assert parent["tags"] == [1]


def test_the_object_of_an_index_node_stays_the_same() -> None:
    """The object may be another index or a retriever, which LlamaIndex calls recursively."""
    target = ["another index"]
    node = NodeWithScore(node=IndexNode(text=PANDA, index_id="x", obj=target))
    (returned,) = BGERerankPostprocessor(scorer=TableScorer()).postprocess_nodes([node], query_str=QUERY)
    assert isinstance(returned.node, IndexNode)
    assert returned.node.obj is target


# --- types of options --------------------------------------------------------------------------------

# For every option, a value of a wrong type that could be converted.
OTHER_TYPES: dict[str, list[Any]] = {
    "model": [3, b"a", None],
    "revision": [3, b"a"],
    "sha256": [10**63, b"0" * 64],
    "cache_folder": [3, b"a"],
    "local_files_only": [1, "true", None],
    "device": [0, b"cpu"],
    "devices": ["cpu", {"cpu"}, [0], iter(["cpu"])],
    "dtype": [32, b"float32"],
    "max_length": ["256", 256.0, True, None],
    "query_max_length": ["64", 64.0, True],
    "max_batch_tokens": ["1024", 1024.0, True],
    "num_threads": ["1", 1.0, True],
    "capture_graphs": [1, "true", None],
    "max_wait_ms": ["1", True, None],
    "max_queued_tokens": ["1000", 1000.0, True],
    "normalize": [1, "true", None],
    "query_instruction": [3, b"a"],
    "passage_instruction": [3, b"a"],
    "long_passages": [1, True],
    "window_overlap_tokens": ["32", 32.0, True],
    "top_n": ["3", 3.0, True],
    "score_threshold": ["0.5", True],
    "keep_retrieval_score": [1, "true", None],
    "timeout": ["3", True],
    "score_key": [3, b"a", None],
    "rank_fields": ["title", {"title"}, [3], iter(["title"])],
    "document_template": [3, b"{page_content}"],
    "query_truncation_side": [1, True],
    "blank_passages": [1, True],
    "mark_unread": [1, "true", None],
}
CASES = [(name, value) for name, values in OTHER_TYPES.items() for value in values]


@pytest.mark.parametrize("adapter_type", [BGEReranker, BGERerankPostprocessor])
@pytest.mark.parametrize(("name", "value"), CASES)
def test_adapters_convert_no_option(adapter_type: type[RerankOptions], name: str, value: Any) -> None:
    if name not in adapter_type.model_fields:
        return
    with pytest.raises(ValidationError, match=name):
        adapter_type(**{name: value})
    adapter = adapter_type()
    with pytest.raises(ValidationError, match=name):
        setattr(adapter, name, value)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_the_config_converts_no_option(name: str, value: Any) -> None:
    if name not in {field.name for field in dataclasses.fields(ScorerConfig)}:
        return
    with pytest.raises(ConfigError, match=name):
        ScorerConfig(**{name: value})


def test_every_option_is_checked() -> None:
    names = set(BGEReranker.model_fields) | set(BGERerankPostprocessor.model_fields)
    assert names - set(OTHER_TYPES) == {"scorer", "callback_manager", "metadata_mode"}


@pytest.mark.parametrize("adapter_type", [BGEReranker, BGERerankPostprocessor])
def test_an_integer_is_accepted_for_a_float_option(adapter_type: type[RerankOptions], tmp_path: Path) -> None:
    adapter = adapter_type(max_wait_ms=1, timeout=2, score_threshold=1, model=tmp_path, cache_folder=tmp_path)
    assert (adapter.max_wait_ms, adapter.timeout, adapter.score_threshold) == (1.0, 2.0, 1.0)


# --- values that cannot be converted or copied --------------------------------------------------------


class Unprintable:
    def __format__(self, spec: str) -> str:
        raise KeyError("VALUE-CANARY")


@pytest.mark.parametrize("options", [{"rank_fields": ["a"]}, {"document_template": "{a}{page_content}"}])
@pytest.mark.parametrize("value", [10**5000, Unprintable()], ids=["huge", "unprintable"])
def test_a_value_without_a_string_is_named_by_its_document(options: dict[str, Any], value: Any) -> None:
    documents = [Document(page_content="t", metadata={"a": each}) for each in (1, value)]
    with pytest.raises(InputError, match="document 1") as caught:
        BGEReranker(scorer=TableScorer(), **options).compress_documents(documents, QUERY)
    assert caught.value.index == 1
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"text_template": "{foo}"},
        {"metadata_template": "{foo}"},
        {"metadata": {"a": 10**5000}},
    ],
    ids=["text_template", "metadata_template", "huge"],
)
def test_a_node_without_a_text_is_named(fields: dict[str, Any]) -> None:
    nodes = [
        NodeWithScore(node=TextNode(text="t", **{"metadata": {"a": 1}, **more})) for more in ({}, fields)
    ]
    with pytest.raises(InputError, match="node 1") as caught:
        BGERerankPostprocessor(scorer=TableScorer()).postprocess_nodes(nodes, query_str=QUERY)
    assert caught.value.index == 1


@pytest.mark.parametrize("depth", [10, 5000])
def test_metadata_of_any_depth_is_returned(depth: int) -> None:
    deep: dict[str, Any] = {}
    for _ in range(depth):
        deep = {"inner": deep}
    document = Document(page_content="t", metadata=deep)
    (result,) = BGEReranker(scorer=TableScorer()).compress_documents([document], QUERY)
    node = NodeWithScore(node=TextNode(text="t", metadata=deep, excluded_embed_metadata_keys=["inner"]))
    (returned,) = BGERerankPostprocessor(scorer=TableScorer()).postprocess_nodes([node], query_str=QUERY)
    assert "relevance_score" not in deep
    for copied in (result.metadata, returned.metadata):
        inner: Any = copied
        num_levels = 0
        while inner := inner.get("inner"):
            num_levels += 1
        assert num_levels == depth - 1
