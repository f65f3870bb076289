"""Each dialect alone: it reads and renders objects, without HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from bge_rerank_integrations import RankedPassage, Ranking
from bge_rerank_integrations.errors import InputError, InputTypeError
from bge_rerank_integrations.server.dialects.dialect import Dialect, Reply, Work
from bge_rerank_integrations.server.dialects.native import NATIVE
from bge_rerank_integrations.server.dialects.nvidia import NVIDIA
from bge_rerank_integrations.server.dialects.rerank import INFINITY, RERANK
from bge_rerank_integrations.server.dialects.score import SCORE
from bge_rerank_integrations.server.dialects.table import DIALECTS, choose, error_body
from bge_rerank_integrations.server.dialects.tei import TEI
from bge_rerank_integrations.server.dialects.voyage import VOYAGE
from bge_rerank_integrations.server.refusal import Refusal

ALL = [RERANK, INFINITY, TEI, VOYAGE, NVIDIA, SCORE, NATIVE]
RANKING = Ranking(
    [RankedPassage(1, 0.75), RankedPassage(0, 0.25, truncated=True)],
    num_pairs=2,
    num_tokens=30,
    num_truncated=1,
)


def render(dialect: Dialect, body: dict[str, Any]) -> Any:
    work = dialect.parse(body)
    return dialect.render(
        Reply(id="r1", created=7, model=work.model or "served", max_length=64, work=work, rankings=[RANKING])
    )


def test_results_contain_documents_only_on_request() -> None:
    body = {"query": "q", "documents": ["a", "b"]}
    assert render(RERANK, body) == {
        "id": "r1",
        "object": "rerank",
        "created": 7,
        "model": "served",
        "results": [
            {"index": 1, "relevance_score": 0.75},
            {"index": 0, "relevance_score": 0.25, "truncated": True},
        ],
        "usage": {"prompt_tokens": 30, "total_tokens": 30},
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": 30, "output_tokens": 0},
            "warnings": ["1 of 2 documents were truncated: a query and a document have 64 tokens at most"],
        },
    }


@pytest.mark.parametrize(
    ("dialect", "documents"),
    [(RERANK, [{"text": "b"}, {"text": "a"}]), (INFINITY, ["b", "a"]), (VOYAGE, ["b", "a"])],
    ids=lambda value: value.name if isinstance(value, Dialect) else "",
)
def test_returned_documents(dialect: Dialect, documents: list[Any]) -> None:
    answer = render(dialect, {"query": "q", "documents": ["a", "b"], "return_documents": True})
    assert [result["document"] for result in answer["results"]] == documents


def test_tei() -> None:
    body = {"query": "q", "texts": ["a", "b"]}
    assert render(TEI, body) == [{"index": 1, "score": 0.75}, {"index": 0, "score": 0.25}]
    assert render(TEI, {**body, "return_text": True})[0] == {"index": 1, "score": 0.75, "text": "b"}
    assert TEI.parse({**body, "raw_scores": True}).raw_scores
    assert TEI.parse({**body, "top_n": 1}).top_n == 1  # LiteLLM sends it
    assert not TEI.parse({**body, "truncate": False}).refuse_truncated


def test_voyage() -> None:
    body = {"query": "q", "documents": ["a", "b"], "top_k": 1, "model": "rerank-2"}
    answer = render(VOYAGE, body)
    assert (answer["object"], answer["model"]) == ("list", "rerank-2")
    assert answer["data"] == answer["results"]
    assert answer["data"][0] == {"index": 1, "relevance_score": 0.75}
    assert answer["usage"]["total_tokens"] == 30
    assert VOYAGE.parse(body).top_n == 1
    assert VOYAGE.parse({**body, "truncation": False}).refuse_truncated
    assert not VOYAGE.parse({**body, "truncation": None}).refuse_truncated


def test_nvidia() -> None:
    body = {"query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "b"}]}
    assert render(NVIDIA, body)["rankings"] == [{"index": 1, "logit": 0.75}, {"index": 0, "logit": 0.25}]
    assert NVIDIA.parse(body) == Work(requests=[("q", ["a", "b"])], raw_scores=True)
    assert NVIDIA.parse({**body, "truncate": "NONE"}).refuse_truncated


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_score(names: tuple[str, str]) -> None:
    first, second = names
    assert SCORE.parse({first: "q", second: ["a", "b"]}).requests == [("q", ["a", "b"])]
    assert SCORE.parse({first: ["q"], second: "a"}).requests == [("q", ["a"])]
    assert SCORE.parse({first: ["q", "r"], second: ["a", "b"]}).requests == [("q", ["a"]), ("r", ["b"])]
    answer = render(SCORE, {first: "q", second: ["a", "b"]})
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": 0.25},
        {"index": 1, "object": "score", "score": 0.75},
    ]
    with pytest.raises(InputError, match="one text, or as many texts"):
        SCORE.parse({first: ["q", "r"], second: ["a", "b", "c"]})


class ReadFields(dict[str, Any]):
    """A body that records which fields are read."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a field."""
        self.names.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.name)
def test_every_field_that_a_dialect_reads_is_described(dialect: Dialect) -> None:
    body = ReadFields(dialect.example)
    dialect.parse(body)
    assert set(dialect.required) <= body.names <= set(dialect.fields)


def test_native_keeps_everything() -> None:
    body = {"requests": [["q", ["a", "b"]]], "top_n": 0, "timeout_s": 3}
    work = NATIVE.parse(body)
    assert (work.top_n, work.timeout_s, work.raw_scores, work.only_scores) == (0, 3.0, True, False)
    assert NATIVE.parse({**body, "only_scores": True}).only_scores
    (ranking,) = render(NATIVE, body)["rankings"]
    assert ranking["passages"][1] == dataclasses.asdict(RANKING[1])
    assert ranking["counts"] == vars(RANKING)


def test_the_number_of_native_requests_is_limited() -> None:
    assert len(NATIVE.parse({"requests": [["q", []]] * 20_000}).requests) == 20_000
    with pytest.raises(Refusal, match="20001 requests") as caught:
        NATIVE.parse({"requests": [["q", []]] * 20_001})
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("field", "value", "top_n"),
    [("top_n", None, None), ("top_n", 0, None), ("top_n", 3, 3), ("top_n", "3", 3), ("top_n", 3.0, 3)],
)
def test_counts_in_all_types_that_clients_send(field: str, value: Any, top_n: int | None) -> None:
    assert RERANK.parse({"query": "q", "documents": [], field: value}).top_n == top_n


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        (None, False),
        (True, True),
        ("true", True),
        ("True", True),
        (1, True),
        (False, False),
        ("false", False),
    ],
)
def test_flags_in_all_types_that_clients_send(value: Any, flag: bool) -> None:
    work = RERANK.parse({"query": "q", "documents": [], "return_documents": value, "raw_scores": value})
    assert (work.return_documents, work.raw_scores) == (flag, flag)


def test_raw_scores_on_request() -> None:
    body = {"query": "q", "documents": []}
    assert not RERANK.parse(body).raw_scores
    assert RERANK.parse({**body, "use_activation": False}).raw_scores
    assert not RERANK.parse({**body, "use_activation": True}).raw_scores
    assert SCORE.parse({"text_1": "q", "text_2": [], "use_activation": "false"}).raw_scores


def test_documents_as_objects() -> None:
    documents = ["plain", {"text": "in a field"}, {"title": "T", "text": "body", "url": "u"}]
    body = {"query": "q", "documents": documents}
    assert RERANK.parse(body).requests == [("q", ["plain", "in a field", "body"])]
    ((_, texts),) = RERANK.parse({**body, "rank_fields": ["title", "text"]}).requests
    assert texts == ["plain", "text: in a field", "title: T\ntext: body"]


@pytest.mark.parametrize(
    ("body", "message", "index"),
    [
        ({}, "'documents' is missing", None),
        ({"documents": ["a"]}, "'query' is missing", None),
        ({"query": None, "documents": ["a"]}, "'query' is missing", None),
        ({"query": 5, "documents": ["a"]}, "must be a string", None),
        ({"query": "q", "documents": "CANARY"}, "must be a list of strings, not str", None),
        ({"query": "q", "documents": ["a", 5]}, "item 1 of 'documents' must be a string", 1),
        ({"query": "q", "documents": ["a", None]}, "item 1 of 'documents' must be a string", 1),
        ({"query": "q", "documents": [{"body": "CANARY"}]}, "without the text to score", 0),
        ({"query": "q", "documents": [], "top_n": -1}, "must not be negative", None),
        ({"query": "q", "documents": [], "top_n": "CANARY"}, "must be an integer or null, not str", None),
        ({"query": "q", "documents": [], "top_n": 1.5}, "must be an integer or null", None),
        ({"query": "q", "documents": [], "top_n": True}, "must be an integer or null", None),
        ({"query": "q", "documents": [], "raw_scores": "CANARY"}, "must be a boolean or null", None),
        ({"query": "q", "documents": [], "raw_scores": {}}, "must be a boolean or null", None),
        ({"query": "q", "documents": [], "rank_fields": "CANARY"}, "list of strings or null", None),
    ],
)
def test_malformed_requests(body: dict[str, Any], message: str, index: int | None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        RERANK.parse(body)
    assert caught.value.index == index
    assert "CANARY" not in str(caught.value)


def test_malformed_native_requests() -> None:
    for requests in (None, "CANARY", {"q": ["a"]}):
        with pytest.raises(InputTypeError, match="'requests' must be a list"):
            NATIVE.parse({"requests": requests})
    with pytest.raises(InputTypeError, match="request 1: passage 0 must be a string"):
        NATIVE.parse({"requests": [["q", ["a"]], ["q", [None]]]})
    with pytest.raises(InputError, match="timeout must"):
        NATIVE.parse({"requests": [], "timeout_s": -1})
    with pytest.raises(InputError, match="'timeout_s' is out of range"):
        NATIVE.parse({"requests": [], "timeout_s": 10**400})
    for timeout in ("3", [3], True):
        with pytest.raises(InputTypeError, match="'timeout_s' must be a number or null"):
            NATIVE.parse({"requests": [], "timeout_s": timeout})


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/", {"query": "q", "texts": []}, TEI),
        ("/rerank", {"query": "q", "texts": []}, TEI),
        ("/rerank", {"query": "q", "documents": []}, RERANK),
        ("/rerank", {"query": "q"}, RERANK),
        ("/v1/rerank", {"query": "q", "documents": [], "top_k": None}, VOYAGE),
        ("/v1/rerank", {"query": "q", "documents": [], "truncation": True}, VOYAGE),
        ("/v1/rerank", {"query": "q", "documents": [], "max_tokens_per_doc": None}, RERANK),
        ("/v2/rerank", {"query": "q", "texts": []}, TEI),
        ("/v2/rerank", {"query": "q", "documents": [], "texts": None}, RERANK),
        ("/infinity/rerank", {"query": "q", "documents": []}, INFINITY),
        ("/v1/score", {}, SCORE),
        ("/v1/ranking", {}, NVIDIA),
        ("/v1/rank", {}, NATIVE),
    ],
)
def test_the_path_and_the_body_choose_the_dialect(path: str, body: dict[str, Any], expected: Dialect) -> None:
    assert choose(DIALECTS[path], body) is expected


@pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.name)
def test_an_error_has_its_message_in_the_fields_of_all_clients(dialect: Dialect) -> None:
    body = error_body(dialect, Refusal(429, "the queue is full", "QueueFullError", retry_after_s=1))
    assert body["message"] == body["detail"] == "the queue is full"
    assert (body["error_type"], body["type"]) == ("Overloaded", "QueueFullError")
    error = body["error"]
    assert (error if isinstance(error, str) else error["message"]) == "the queue is full"
    assert isinstance(error, dict) == (dialect in (RERANK, INFINITY, SCORE))
    assert "index" not in body
    assert error_body(dialect, Refusal(400, "x", "InputError", index=0))["index"] == 0
