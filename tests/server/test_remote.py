"""`RemoteScorer` with a real server, and with responses that a real server gives rarely."""

from __future__ import annotations

import asyncio
import copy
import gc
import http.server
import json
import math
import pickle
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import SecretStr

from bge_rerank_integrations import (
    BGEReranker,
    BGERerankPostprocessor,
    RankedPassage,
    RemoteScorer,
    Scorer,
    SupportsRank,
    divided_calls,
)
from bge_rerank_integrations.errors import (
    AuthenticationError,
    ConfigError,
    DeviceLostError,
    InputError,
    InputTypeError,
    NonFiniteScoreError,
    QueueFullError,
    RemoteError,
    RequestTimeoutError,
    RerankError,
    ScorerClosedError,
    ServerUnreachableError,
)
from bge_rerank_integrations.remote_wire import Answer, _retry_after, retry_delay
from bge_rerank_integrations.server import create_app
from bge_rerank_integrations.server.endpoint import read_headers
from bge_rerank_integrations.validation import MAX_TIMEOUT_S
from tests.server.conftest import KEY
from tests.support.queues import PATIENCE_S
from tests.support.servers import HeldScorer, running, wait_until

QUERY = "what does a giant panda eat?"
PASSAGES = ["Tea is hot.", "The giant panda eats bamboo.", "", "A car. " * 400, "Bears eat fish.", "\ud800 x"]


@pytest.fixture
def scorer(keyed_url: str) -> Iterator[RemoteScorer]:
    """Return a scorer that asks the small checkpoint's server."""
    with RemoteScorer(keyed_url, api_key=KEY) as scorer:
        yield scorer


def test_it_has_the_methods_that_adapters_call(scorer: RemoteScorer) -> None:
    assert isinstance(scorer, SupportsRank)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("top_n", "threshold"), [(None, None), (2, None), (0, None), (None, 0.45), (3, 0.1)])
async def test_rank_equals_the_local_scorer(
    normalize: bool, top_n: int | None, threshold: float | None, keyed_url: str, checkpoint: Path
) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", normalize=normalize) as own:
        expected = own.rank(QUERY, PASSAGES, top_n, threshold)
    async with (
        RemoteScorer(keyed_url, api_key=KEY, normalize=normalize) as scorer,
        RemoteScorer(keyed_url, api_key=KEY) as raw,
    ):
        for found in (
            scorer.rank(QUERY, PASSAGES, top_n, threshold),
            await scorer.arank(QUERY, PASSAGES, top_n, threshold),
            raw.rank(QUERY, PASSAGES, top_n, threshold, normalize=normalize, timeout=20),
            scorer.rank_many([(QUERY, PASSAGES)], top_n, threshold, normalize=normalize)[0],
        ):
            assert found == expected
            assert vars(found) == vars(expected)


async def test_rank_many_and_score_equal_the_local_scorer(scorer: RemoteScorer, local: Scorer) -> None:
    requests = [(QUERY, PASSAGES), ("tea", []), ("tea", PASSAGES[:2])]
    expected = local.rank_many(requests, 3)
    assert scorer.rank_many(requests, 3) == expected == await scorer.arank_many(requests, 3)
    pairs = [(QUERY, text) for text in PASSAGES] + [("tea", text) for text in PASSAGES]
    scores = local.score(pairs)
    assert scorer.score(pairs) == scores == await scorer.ascore(pairs)
    assert scorer.score(iter(pairs)) == pytest.approx(scores, abs=1e-5)
    assert scorer.score([]) == [] == await scorer.ascore(iter([]))
    await scorer.aclose()


def test_the_number_of_windows_is_returned(checkpoint: Path) -> None:
    with (
        Scorer(checkpoint, device="cpu", dtype="float32", long_passages="windows") as own,
        running(create_app(own)) as url,
        RemoteScorer(url) as scorer,
    ):
        expected = own.rank(QUERY, PASSAGES)
        assert max(passage.windows for passage in expected) > 1
        assert scorer.rank(QUERY, PASSAGES) == expected


@pytest.mark.parametrize("normalize", [False, True])
async def test_through_both_adapters(normalize: bool, scorer: RemoteScorer, local: Scorer) -> None:
    texts = [text for text in PASSAGES if text.strip()]
    expected = [
        (passage.index, passage.score) for passage in local.rank(QUERY, texts, 3, normalize=normalize)
    ]
    langchain = BGEReranker(scorer=scorer, top_n=3, normalize=normalize, timeout=20)
    documents = [Document(page_content=text, metadata={"at": at}) for at, text in enumerate(texts)]
    for ranked in (
        langchain.compress_documents(documents, QUERY),
        await langchain.acompress_documents(documents, QUERY),
    ):
        assert [(each.metadata["at"], each.metadata["relevance_score"]) for each in ranked] == expected
    (many,) = langchain.rerank_many([(QUERY, texts)])
    assert [(each["index"], each["relevance_score"]) for each in many] == expected
    llama_index = BGERerankPostprocessor(scorer=scorer, top_n=3, normalize=normalize, timeout=20)
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at))) for at, text in enumerate(texts)]
    for found in (
        llama_index.postprocess_nodes(nodes, query_str=QUERY),
        await llama_index.apostprocess_nodes(nodes, query_str=QUERY),
    ):
        assert [(int(node.node_id), node.score) for node in found] == expected
    await scorer.aclose()


async def test_a_call_that_aclose_overtakes_has_a_result_or_a_typed_error(keyed_url: str) -> None:
    for num_turns in range(8):
        scorer = RemoteScorer(keyed_url, api_key=KEY)
        await scorer.arank(QUERY, PASSAGES)
        call = asyncio.ensure_future(scorer.arank(QUERY, PASSAGES))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await scorer.aclose()
        with suppress(RerankError):
            assert len(await call) == len(PASSAGES)


async def test_an_asynchronous_stream(scorer: RemoteScorer, local: Scorer) -> None:
    pairs = [(QUERY, text) for text in PASSAGES]

    async def stream() -> AsyncIterator[tuple[str, str]]:
        for pair in pairs:
            yield pair

    assert await scorer.ascore(stream()) == local.score(pairs)  # blank passages too, unlike rank
    await scorer.aclose()


def test_adapters_with_a_remote_scorer_can_be_dumped_and_pickled(
    keyed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BGE_RERANK_API_KEY", KEY)
    scorer = RemoteScorer(keyed_url, timeout=5.0, max_retries=1, normalize=True)
    for adapter in (BGEReranker(scorer=scorer, top_n=1), BGERerankPostprocessor(scorer=scorer, top_n=1)):
        dumped = json.dumps(adapter.model_dump(mode="json"))
        pickled = pickle.dumps(adapter)
        for shown in (dumped, repr(adapter), repr(scorer), json.dumps(scorer.to_dict()), str(vars(scorer))):
            assert KEY not in shown
        assert KEY.encode() not in pickled
        again = pickle.loads(pickled)
        assert isinstance(again.scorer, RemoteScorer)
        assert again.scorer.to_dict() == scorer.to_dict()
        assert again.scorer.rank(QUERY, PASSAGES) == scorer.rank(QUERY, PASSAGES)
        again.scorer.close()
        assert copy.deepcopy(adapter).scorer is scorer
    assert RemoteScorer.from_dict(scorer.to_dict()).to_dict() == scorer.to_dict()
    scorer.close()


def test_the_api_key(keyed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BGE_RERANK_API_KEY", raising=False)
    for key in ("wrong", None):
        with RemoteScorer(keyed_url, api_key=key) as scorer, pytest.raises(AuthenticationError, match="401"):
            scorer.rank("a", ["b"])
    for secret in (KEY, SecretStr(KEY)):
        with RemoteScorer(keyed_url + "/v1/", api_key=secret) as scorer:
            assert len(scorer.rank("a", ["b"])) == 1
    monkeypatch.setenv("BGE_RERANK_API_KEY", KEY)
    with RemoteScorer(keyed_url) as scorer:
        assert len(scorer.rank("a", ["b"])) == 1


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        ("", "begin with http"),
        ("localhost:8000", "begin with http"),
        ("ftp://host", "begin with http"),
        ("http://", "contain a host"),
        ("http://user:CANARY@host", "must not contain credentials"),
        ("http://CANARY@host", "must not contain credentials"),
        ("http://host?key=CANARY", "must not contain a query"),
        ("http://host#CANARY", "or a fragment"),
        ("http://host/?", "must not contain a query"),
        ("http://host/#", "or a fragment"),
        ("http://host/%23", "encoded"),
        ("http://host/v1/rerank", "not one of its endpoints"),
        ("http://host/v1/rerank/", "not one of its endpoints"),
        ("http://host/rerank", "not one of its endpoints"),
        ("http://host:port", "not a URL"),
        ("http://host:0", "from 1 to 65535"),
        ("http://host:65536", "from 1 to 65535"),
        (5, "not a URL"),
    ],
)
def test_wrong_base_urls(base_url: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RemoteScorer(base_url)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": True}, "max_retries"),
        ({"normalize": 1}, "normalize"),
        ({"api_key": "CANARY with spaces"}, "api_key"),
        ({"api_key": "CANARY\n"}, "api_key"),
        ({"api_key": ""}, "api_key"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RemoteScorer("http://host", **settings)
    assert "CANARY" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown"):
        RemoteScorer.from_dict({"base_url": "http://host", "api_key": "x"})
    for data in (None, ["base_url"], {1: 2, "x": 3, "base_url": "http://host"}, {"base_url": 5}):
        with pytest.raises(ConfigError):
            RemoteScorer.from_dict(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("http://host:8000", "http://host:8000/v1/rank"),
        ("http://host:8000/", "http://host:8000/v1/rank"),
        ("http://host/v1", "http://host/v1/rank"),
        ("https://host/proxy/rerankers/", "https://host/proxy/rerankers/v1/rank"),
        ("https://host/proxy/v1/", "https://host/proxy/v1/rank"),
        ("https://host/rerank/", "https://host/rerank/v1/rank"),
        ("http://[::1]:8000", "http://[::1]:8000/v1/rank"),
    ],
)
def test_base_urls_keep_their_prefix(base_url: str, url: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return ranked(request)

    stub(answer, base_url=base_url).rank("a", ["b"])
    assert asked == [url]
    scorer = RemoteScorer(base_url)
    assert repr(RemoteScorer.from_dict(scorer.to_dict())) == repr(scorer)
    assert repr(pickle.loads(pickle.dumps(scorer))) == repr(scorer)


def test_arguments_are_checked_before_anything_is_sent() -> None:
    scorer = stub(Answers())
    calls: list[tuple[Callable[[], Any], int | None]] = [
        (lambda: scorer.rank(5, ["a"]), None),  # type: ignore[arg-type]
        (lambda: scorer.rank("q", ["a", None]), 1),  # type: ignore[list-item]
        (lambda: scorer.rank("q", "abc"), None),
        (lambda: scorer.rank("q", ["a"], top_n=-1), None),
        (lambda: scorer.rank("q", ["a"], threshold=float("nan")), None),
        (lambda: scorer.rank("q", ["a"], timeout=-1), None),
        (lambda: scorer.rank_many([("q", ["a"]), ("q", "b")]), 1),
        (lambda: scorer.score([("q", "a"), ("q", 5)]), 1),  # type: ignore[list-item]
    ]
    for call, index in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.index == index


# Responses that a server gives rarely. The client of the test returns them.


def ranked(request: httpx.Request) -> httpx.Response:
    """Return descending scores, and fields that a later version may have."""
    sent = json.loads(request.content)
    rankings = [
        {
            "passages": [
                {"index": index, "score": -float(index), "unheard_of": 1} for index in range(len(passages))
            ][: sent.get("top_n")],
            "counts": {"num_pairs": len(passages), "num_tokens": 3, "num_unheard_of": 1},
        }
        for _, passages in sent["requests"]
    ]
    return httpx.Response(200, json={"rankings": rankings})


def stub(
    answer: Callable[[httpx.Request], Any], base_url: str = "http://host", **settings: Any
) -> RemoteScorer:
    transport = httpx.MockTransport(answer)
    return RemoteScorer(
        base_url,
        client=httpx.Client(transport=transport),
        async_client=httpx.AsyncClient(transport=transport),
        **settings,
    )


class Answers:
    """Returns one response after the other, and records the times of the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = iter(answers)
        self.times: list[float] = []
        self.requests: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.times.append(time.monotonic())
        self.requests.append(json.loads(request.content))
        answer = next(self._answers, None)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            return ranked(request)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def refused(status: int, type_: str, **more: Any) -> httpx.Response:
    headers = {"retry-after": more.pop("retry_after")} if "retry_after" in more else {}
    return httpx.Response(status, json={"message": "told", "type": type_, **more}, headers=headers)


@pytest.fixture
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make delays between attempts short."""
    monkeypatch.setattr(divided_calls, "_FIRST_DELAY_S", 0.001)


RETRIED = [
    httpx.ConnectError("no"),
    httpx.ReadError("no"),
    httpx.RemoteProtocolError("no"),
    refused(429, "QueueFullError"),
    httpx.Response(500),  # from a proxy that lost its server
    httpx.Response(502),
    refused(503, "ServerDraining"),
    httpx.Response(504),
]


@pytest.mark.parametrize(
    "failure", RETRIED, ids=lambda failure: str(getattr(failure, "status_code", failure))
)
async def test_temporary_failures_are_retried(failure: Any, short_delays: None) -> None:
    for call in (
        lambda scorer: asyncio.to_thread(scorer.rank, "a", ["b"]),
        lambda scorer: scorer.arank("a", ["b"]),
    ):
        answers = Answers(failure, failure)
        assert await call(stub(answers, max_retries=2)) == [RankedPassage(0, 0.0)]
        assert len(answers.times) == 3
        answers = Answers(*[failure] * 5)
        with pytest.raises(RerankError):
            await call(stub(answers, max_retries=1))
        assert len(answers.times) == 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refused(400, "InputError"), InputError),
        (refused(401, "AuthenticationError"), AuthenticationError),
        (httpx.Response(400), RemoteError),
        (httpx.Response(403), AuthenticationError),
        (httpx.Response(404), RemoteError),
        (httpx.Response(302, headers={"location": "http://elsewhere"}), RemoteError),
        (httpx.Response(413), InputError),
        (refused(500, "InternalError"), RemoteError),
        (refused(500, "NonFiniteScoreError", index=0), NonFiniteScoreError),
        (refused(504, "RequestTimeoutError"), RequestTimeoutError),
        (httpx.ReadTimeout("slow"), RequestTimeoutError),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), ServerUnreachableError),
        (httpx.Response(200, content=b"hello"), RemoteError),
        (httpx.Response(200, json=[]), RemoteError),
        (httpx.Response(200, json={"rankings": []}), RemoteError),
        (httpx.Response(200, json={"rankings": [{"passages": [{"index": 0}], "counts": {}}]}), RemoteError),
        (httpx.Response(200, json={"rankings": [{"passages": [5], "counts": {}}]}), RemoteError),
    ],
)
async def test_permanent_failures_are_not_retried(answer: Any, kind: type[RerankError]) -> None:
    for call in (
        lambda scorer: asyncio.to_thread(scorer.rank, "a", ["b"]),
        lambda scorer: scorer.arank("a", ["b"]),
    ):
        answers = Answers(answer)
        with pytest.raises(kind) as caught:
            await call(stub(answers))
        assert type(caught.value) is kind
        assert len(answers.times) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refused(429, "QueueFullError"), QueueFullError),
        (httpx.Response(429), QueueFullError),
        (refused(503, "DeviceLostError"), DeviceLostError),
        (refused(503, "ModelNotLoaded"), ServerUnreachableError),
        (httpx.Response(502), ServerUnreachableError),
        (httpx.Response(500), RemoteError),
        (httpx.ConnectError("no"), ServerUnreachableError),
    ],
)
def test_the_error_after_the_last_retry(answer: Any, kind: type[RerankError]) -> None:
    with pytest.raises(kind) as caught:
        stub(Answers(answer), max_retries=0).rank("a", ["b"])
    assert type(caught.value) is kind


def test_messages_of_other_servers_are_left_out() -> None:
    with pytest.raises(RemoteError) as caught:
        stub(Answers(httpx.Response(400, json={"message": "CANARY"}))).rank("a", ["b"])
    assert "CANARY" not in str(caught.value)


def test_the_error_says_why_a_connection_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    scorer = RemoteScorer(f"http://127.0.0.1:{port}", max_retries=0)
    with scorer, pytest.raises(ServerUnreachableError, match=r"ConnectError: .*[Rr]efused"):
        scorer.rank("a", ["b"])
    # Such a message may contain the value of a header.
    with pytest.raises(ServerUnreachableError) as caught:
        stub(Answers(httpx.LocalProtocolError("CANARY")), max_retries=0).rank("a", ["b"])
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(("told", "shown"), [("told", "told"), ("x" * 100_000, "x" * 500)])
def test_messages_of_this_packages_server_are_shown(told: str, shown: str) -> None:
    answer = httpx.Response(400, json={"message": told, "type": "InputError"})
    with pytest.raises(InputError) as caught:
        stub(Answers(answer)).rank("a", ["b"])
    assert str(caught.value) == f"the server answered with status 400: {shown}"


def test_a_call_without_time_sends_nothing_and_says_so() -> None:
    answers = Answers()
    with pytest.raises(RequestTimeoutError, match="the server did not answer within the timeout"):
        stub(answers).rank("a", ["b"], timeout=0)
    assert not answers.requests


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        (None, 0.5, 1.0),
        ("7", 7, 7.5),
        ("0.5", 0.5, 1.0),
        ("-1", 0, 0.5),
        ("nan", 0.5, 1.0),
        ("1e20", MAX_TIMEOUT_S, MAX_TIMEOUT_S + 0.5),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_TIMEOUT_S, MAX_TIMEOUT_S + 0.5),
        ("soon", 0.5, 1.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0.5),
    ],
)
def test_delays_between_attempts(retry_after: str | None, least: float, most: float) -> None:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    for _ in range(20):
        delay = retry_delay(Answer(429, headers, b""), QueueFullError("full"), attempt=2)
        assert delay is not None
        assert least <= delay <= most
    assert (retry_delay(Answer(503, {}, b""), ServerUnreachableError(), attempt=100) or 99) <= 8


def test_no_attempt_starts_after_the_timeout() -> None:
    answers = Answers(refused(429, "QueueFullError", retry_after="7"))
    with pytest.raises(QueueFullError):
        stub(answers).rank("a", ["b"], timeout=5)
    assert len(answers.times) == 1


async def test_all_attempts_share_one_timeout(held: HeldScorer) -> None:
    with running(create_app(held)) as url:  # type: ignore[arg-type]
        for settings, options in (({"timeout": 0.3}, {}), ({}, {"timeout": 0.3})):
            async with RemoteScorer(url, **settings) as scorer:  # type: ignore[arg-type]
                for call in (
                    lambda scorer=scorer, options=options: asyncio.to_thread(
                        scorer.rank, "a", ["b"], **options
                    ),
                    lambda scorer=scorer, options=options: scorer.arank("a", ["b"], **options),
                ):
                    started = time.monotonic()
                    with pytest.raises(RequestTimeoutError):
                        await call()
                    assert time.monotonic() - started < 3
        await asyncio.to_thread(wait_until, lambda: held.queued_tokens == 0)  # what was asked for is dropped


def test_many_pairs_are_sent_in_several_requests() -> None:
    answers = Answers()
    passages = [str(number) for number in range(2500)]
    found = stub(answers).rank("q", passages, top_n=2)
    sizes = [sum(len(texts) for _, texts in request["requests"]) for request in answers.requests]
    assert sizes == [1024, 1024, 452]
    assert [passage.index for passage in found] == [0, 1024]  # each piece's best has logit 0
    assert found.num_pairs == 2500
    answers = Answers()
    stub(answers).rank("q", ["x" * 600_000] * 3)
    assert len(answers.requests) == 3


def test_an_iterator_is_read_while_it_is_scored() -> None:
    read = 0
    most_ahead = 0
    answers = Answers()

    def stream() -> Iterator[tuple[str, str]]:
        nonlocal read, most_ahead
        for number in range(5000):
            read += 1
            sent = sum(len(texts) for request in answers.requests for _, texts in request["requests"])
            most_ahead = max(most_ahead, read - sent)
            yield f"q{number // 3}", "p"

    assert len(stub(answers).score(stream())) == 5000
    assert most_ahead <= 1024
    with pytest.raises(InputTypeError) as caught:
        stub(Answers()).score(iter([("q", "p")] * 1500 + [("q", 5)]))  # type: ignore[arg-type]
    assert caught.value.index == 1500


async def test_slow_iterators_leave_the_loop_free() -> None:
    reading, ticked = threading.Event(), threading.Event()

    def wait_for_loop() -> None:
        reading.set()
        assert ticked.wait(PATIENCE_S), "the loop was blocked"

    def stream_pairs() -> Iterator[tuple[str, str]]:
        wait_for_loop()
        yield from [("q", "p")] * 1500

    def stream_requests() -> Iterator[tuple[str, list[str]]]:
        wait_for_loop()
        yield "q", ["a", "b"]

    scorer = stub(Answers())
    calls: list[tuple[Coroutine[Any, Any, list[Any]], int]] = [
        (scorer.ascore(stream_pairs()), 1500),
        (scorer.arank_many(stream_requests()), 1),
    ]
    for call, count in calls:
        reading.clear()
        ticked.clear()
        task = asyncio.create_task(call)
        assert await asyncio.to_thread(reading.wait, PATIENCE_S)
        ticked.set()
        assert len(await task) == count


async def test_reading_counts_towards_the_timeout() -> None:
    may_end = threading.Event()

    def stream_pairs() -> Iterator[tuple[str, str]]:
        may_end.wait(PATIENCE_S)
        yield "q", "p"

    async def astream_pairs() -> AsyncIterator[tuple[str, str]]:
        await asyncio.Event().wait()
        yield "q", "p"

    def stream_requests() -> Iterator[tuple[str, list[str]]]:
        may_end.wait(PATIENCE_S)
        yield "q", ["a", "b"]

    def stream_slow_requests() -> Iterator[tuple[str, list[str]]]:
        time.sleep(0.1)
        yield "q", ["a", "b"]

    answers = Answers()
    scorer = stub(answers)
    for call in (
        scorer.ascore(stream_pairs(), timeout=0.05),
        scorer.ascore(astream_pairs(), timeout=0.05),
        scorer.arank_many(stream_requests(), timeout=0.05),
        asyncio.to_thread(scorer.rank_many, stream_slow_requests(), timeout=0.05),
    ):
        with pytest.raises(RequestTimeoutError):
            await call
    may_end.set()
    assert not answers.requests


def test_a_wrong_timeout_is_refused_before_anything_is_read() -> None:
    requests = iter([("q", ["a"])])
    with pytest.raises(InputError, match="timeout"):
        stub(Answers()).rank_many(requests, timeout=-1)
    assert next(requests) == ("q", ["a"])


async def test_a_refused_passage_is_named_as_by_the_local_scorer(checkpoint: Path) -> None:
    """The client splits requests at 1024 passages, and the server at 512."""
    blank_late = [*(f"passage {number}" for number in range(1600)), " "]
    with (
        Scorer(checkpoint, device="cpu", blank_passages="refuse") as own,
        running(create_app(own)) as url,
        RemoteScorer(url) as scorer,
    ):
        requests: list[Any] = [("a", ["b"]), ("c", blank_late), ("d", [""])]
        for whole in (requests, requests[:2], requests[1:], requests[2:], [*requests[:1], *requests[2:]]):
            with pytest.raises(InputError) as expected:
                own.rank_many(whole)
            with pytest.raises(InputError) as caught:
                scorer.rank_many(whole)
            with pytest.raises(InputError) as acaught:
                await scorer.arank_many(whole)
            passage = re.search(r"passage \d+ .*", str(expected.value))
            assert passage is not None
            for error in (caught.value, acaught.value):
                assert error.index == expected.value.index is not None
                assert f"request {error.index}:" in str(error)
                assert str(error).endswith(passage[0])
        with pytest.raises(InputError, match="passage 1600 is blank") as caught:
            scorer.rank("q", blank_late)
        assert caught.value.index == 1600
        await scorer.aclose()


def test_an_error_of_a_lone_request_names_it() -> None:
    requests = [("a", ["b"]), ("c", ["d"] * 1024)]  # the second does not fit into the first's HTTP request
    answers = Answers(
        ranked(httpx.Request("POST", "http://x", json={"requests": [["a", ["b"]], ["c", ["d"] * 1023]]})),
        refused(400, "InputTypeError"),  # such as for a query that only the server's tokenizer finds blank
    )
    with pytest.raises(InputTypeError, match="request 1: ") as caught:
        stub(answers).rank_many(requests)
    assert caught.value.index == 1


@pytest.mark.parametrize("index", [None, True, "1", -1, 2.0, 7])
def test_an_invalid_index_of_the_server_is_left_out(index: object) -> None:
    scorer = stub(Answers(refused(400, "InputError", index=index)))
    with pytest.raises(InputError) as caught:
        scorer.rank("q", ["a", "b"])
    assert caught.value.index is None


def test_the_index_of_a_score_that_is_not_finite_counts_all_requests() -> None:
    pairs = [("q", str(number)) for number in range(2000)]
    calls: list[Callable[[RemoteScorer], object]] = [
        lambda scorer: scorer.score(pairs),
        lambda scorer: scorer.score(iter(pairs)),
        lambda scorer: scorer.rank("q", [passage for _, passage in pairs]),
    ]
    for call in calls:
        first = ranked(httpx.Request("POST", "http://x", json={"requests": [["q", ["x"] * 1024]]}))
        answers = Answers(first, refused(500, "NonFiniteScoreError", index=3))
        with pytest.raises(NonFiniteScoreError, match="1027") as caught:
            call(stub(answers))
        assert caught.value.index == 1027


def test_each_process_and_each_event_loop_has_one_pool(scorer: RemoteScorer) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(scorer.rank("a", ["b"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    with scorer._transport._sync_client() as client, scorer._transport._sync_client() as same:
        assert client is same

    async def twice() -> httpx.AsyncClient:
        await asyncio.gather(scorer.arank("a", ["b"]), scorer.arank("a", ["c"]))
        client = scorer._transport._async_client()
        assert client is scorer._transport._async_client()
        await scorer._transport._async_clients.pop(asyncio.get_running_loop()).aclose()
        return client

    assert asyncio.run(twice()) is not asyncio.run(twice())


# Python warns of sockets that nobody has closed. `aclose` would do that, if the caller used it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_clients_of_closed_event_loops_are_released(open_url: str) -> None:
    scorer = RemoteScorer(open_url)
    folder = Path("/proc/self/fd")
    before = 0
    for number in range(20):
        asyncio.run(scorer.arank("a", ["b"]))
        if number == 2 and folder.exists():
            gc.collect()
            before = len(list(folder.iterdir()))
    gc.collect()
    assert len(scorer._transport._async_clients) == 1
    if folder.exists():  # the server, in this process, closes its ends a moment later
        wait_until(lambda: len(list(folder.iterdir())) <= before + 2)


@pytest.mark.parametrize("is_async", [False, True])
async def test_cookies_of_a_server_are_not_kept(is_async: bool) -> None:
    seen: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        seen.append(read_headers(scope).get("cookie"))
        body = json.dumps({"rankings": [{"passages": [{"index": 0, "score": 1.0}], "counts": {}}]}).encode()
        headers = {"set-cookie": b"sid=\xe9", "content-length": str(len(body)).encode()}
        encoded = [(name.encode(), value) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        await send({"type": "http.response.body", "body": body})

    with running(app) as url, RemoteScorer(url, max_retries=0) as scorer:
        for _ in range(3):
            if is_async:
                await scorer.arank("a", ["b"])
            else:
                await asyncio.to_thread(scorer.rank, "a", ["b"])
        await scorer.aclose()
    assert seen == [None] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://host:1"),
        ("HTTP_PROXY", "foo://user:CANARY@host"),
        ("HTTP_PROXY", "::"),
        ("SSL_CERT_FILE", "/none"),
    ],
)
async def test_settings_of_the_environment_that_cannot_be_used(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    scorer = RemoteScorer("http://host")
    with pytest.raises(ConfigError, match=name) as caught:
        await asyncio.to_thread(scorer.rank, "a", ["b"])
    assert "CANARY" not in str(caught.value)
    with pytest.raises(ConfigError, match=name):
        await scorer.arank("a", ["b"])


async def test_a_closed_scorer(keyed_url: str) -> None:
    scorer = RemoteScorer(keyed_url, api_key=KEY)
    scorer.rank("a", ["b"])
    await scorer.arank("a", ["b"])
    with scorer._transport._sync_client() as client:
        async_client = scorer._transport._async_client()
    await scorer.aclose()
    scorer.close()
    assert client.is_closed
    assert async_client.is_closed
    with pytest.raises(ScorerClosedError):
        scorer.rank("a", ["b"])
    with pytest.raises(ScorerClosedError):
        await scorer.arank("a", ["b"])


def test_a_call_that_ctrl_c_has_ended_stops_no_later_call(
    scorer: RemoteScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scorer.score([(QUERY, "a panda")])

    def interrupted(client: httpx.Client, *_: object, **__: object) -> None:
        # Ctrl-C can end httpcore's `ThreadLock.__enter__` when the lock is taken.
        transport: Any = client._transport
        transport._pool._optional_thread_lock.__enter__()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(httpx.Client, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scorer.score([(QUERY, "a panda")])
    answers: Queue[list[float]] = Queue()
    threading.Thread(target=lambda: answers.put(scorer.score([(QUERY, "a panda")])), daemon=True).start()
    assert answers.get(timeout=PATIENCE_S) == expected


def test_a_given_client_stays_open_and_cannot_be_pickled() -> None:
    scorer = stub(ranked)
    scorer.close()
    assert scorer._transport._given_client is not None
    assert not scorer._transport._given_client.is_closed
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(scorer)


def passage(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "score": 1.0, **fields}


@pytest.mark.parametrize(
    "passages",
    [
        [],
        [passage()],
        [passage(), passage()],
        [passage(), passage(index=2)],
        [passage(), passage(index=-1)],
        [passage(), passage(index="1")],
        [passage(), passage(index=1, score="high")],
        [passage(), passage(index=1, score=None)],
        [passage(), passage(index=1, score=10**400)],
        [passage(), passage(index=1, score=math.nan)],
        [passage(), passage(index=1, score=math.inf)],
        [passage(), passage(index=1, truncated="no")],
    ],
)
def test_an_answer_that_is_not_a_ranking_of_the_passages_is_refused(passages: list[Any]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, content=json.dumps({"rankings": [{"passages": passages, "counts": {"num_pairs": 2}}]})
        )

    with pytest.raises(RemoteError, match="not a ranking"):
        stub(answer).rank("q", ["a", "b"])
    with pytest.raises(RemoteError, match="not a ranking"):
        stub(answer).score([("q", "a"), ("q", "b")])


@pytest.mark.parametrize("count", ["x", -1, True, 1.0, None])
def test_counts_that_are_no_numbers_are_refused(count: object) -> None:
    ranking = {"passages": [passage()], "counts": {"num_pairs": count}}
    with pytest.raises(RemoteError):
        stub(lambda _: httpx.Response(200, json={"rankings": [ranking]})).rank("q", ["a"])


def test_pairs_with_a_blank_query_are_scored_as_by_a_local_scorer(
    scorer: RemoteScorer, local: Scorer
) -> None:
    pairs = [("q", "a"), ("", "text"), (" ", ""), ("q", "b")]
    assert scorer.score(pairs) == pytest.approx(local.score(pairs), abs=1e-5)


def test_closing_during_calls_of_other_threads() -> None:
    """Each call ends at once: with a result, or because the scorer is closed."""
    entered, go_on = threading.Barrier(5), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            entered.wait()
            go_on.wait()
            content = ranked(httpx.Request("POST", "http://x", content=body)).content
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scorer = RemoteScorer(f"http://127.0.0.1:{server.server_port}", timeout=30.0)
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(scorer.rank, "q", ["a"]) for _ in range(4)]
            entered.wait(30)
            with scorer._transport._sync_client() as client:
                scorer.close()
                assert not client.is_closed
            go_on.set()
            assert [len(call.result(20)) for call in calls] == [1, 1, 1, 1]
        assert client.is_closed
        assert scorer._transport._client is None
        server.shutdown()


def test_a_closed_scorer_does_not_try_again() -> None:
    def close_and_fail(request: httpx.Request) -> httpx.Response:
        closing.close()
        return httpx.Response(503, headers={"retry-after": "0"})

    closing = stub(close_and_fail)
    with pytest.raises(ScorerClosedError):
        closing.rank("q", ["a"])


def test_a_given_client_that_is_closed_or_redirects_forever() -> None:
    closed = httpx.Client()
    closed.close()
    with pytest.raises(ScorerClosedError, match="given"):
        RemoteScorer("http://host", client=closed).rank("q", ["a"])
    transport = httpx.MockTransport(
        lambda _: httpx.Response(307, headers={"location": "http://host/v1/rank"})
    )
    looping = httpx.Client(transport=transport, follow_redirects=True)
    with pytest.raises(ServerUnreachableError, match="TooManyRedirects"):
        RemoteScorer("http://host", client=looping, max_retries=0).rank("q", ["a"])


@pytest.mark.parametrize(
    "settings", [{"timeout": 31_536_001}, {"timeout": 1e12}, {"api_key": 5}, {"api_key": b"abc"}]
)
def test_settings_that_no_call_could_use_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RemoteScorer("http://host", **settings)


def test_hosts_that_are_no_names_are_refused() -> None:
    for host in ("a..b", "a" * 64 + ".com"):
        with pytest.raises(ConfigError, match="base_url"):
            RemoteScorer(f"http://{host}")


@pytest.mark.parametrize("password", ["SECRET/x", "SECRET#x", "a@SECRET"])
def test_a_proxy_password_is_not_shown(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{password}@127.0.0.1:9")
    with pytest.raises(RerankError) as caught:
        RemoteScorer("http://host.invalid", max_retries=0).rank("a", ["b"])
    assert "SECRET" not in str(caught.value)


def test_an_empty_key_in_the_environment_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BGE_RERANK_API_KEY", "")
    assert RemoteScorer("http://host")._key.headers() == {}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999", None),
        (time.asctime(time.gmtime(time.time() + 100)), 100.0),
    ],
)
def test_dates_of_retry_after(value: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        seconds = _retry_after(value)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert seconds == (None if expected is None else pytest.approx(expected, abs=3600))
