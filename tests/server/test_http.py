"""The server over a real connection."""

from __future__ import annotations

import concurrent.futures
import gzip
import http.client
import json
import logging
import re
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import (
    ConfigError,
    DeviceLostError,
    NonFiniteScoreError,
    RequestTimeoutError,
    ScorerClosedError,
    WorkerDiedError,
)
from bge_rerank_integrations.ranking import sigmoid
from bge_rerank_integrations.server import ServerSettings, create_app
from bge_rerank_integrations.server.body import _Compressed, read_body
from bge_rerank_integrations.server.dialects.table import DIALECTS
from bge_rerank_integrations.server.endpoint import MAX_PAIRS_OF_REQUEST
from bge_rerank_integrations.server.refusal import Refusal
from tests.server.conftest import KEY
from tests.support.servers import HeldScorer, running, wait_until

QUERY = "what does a giant panda eat?"
PASSAGES = [
    "The giant panda eats bamboo.",
    "Tea is a hot drink.",
    "",
    "Bears eat fish, berries and honey.",
    "A car has four wheels. " * 200,
    "Python is a programming language.",
]
COHERE = {"query": QUERY, "documents": PASSAGES}
TEI = {"query": QUERY, "texts": PASSAGES}
REQUESTS: dict[str, dict[str, Any]] = {
    "/": TEI,
    "/rerank": TEI,
    "/v1/rerank": COHERE,
    "/v2/rerank": COHERE,
    "/infinity/rerank": COHERE,
    "/voyage/v1/rerank": COHERE,
    "/score": {"text_1": QUERY, "text_2": PASSAGES},
    "/v1/score": {"text_1": QUERY, "text_2": PASSAGES},
    "/ranking": {"query": {"text": QUERY}, "passages": [{"text": text} for text in PASSAGES]},
    "/v1/ranking": {"query": {"text": QUERY}, "passages": [{"text": text} for text in PASSAGES]},
    "/v1/rank": {"requests": [[QUERY, PASSAGES]]},
}


def scores_of(answer: Any) -> list[tuple[int, float]]:
    """Return the (index, score) pairs of a response in any dialect, in its order."""
    if isinstance(answer, dict):
        if "rankings" in answer and "passages" in answer["rankings"][0]:
            answer = answer["rankings"][0]["passages"]
        else:
            answer = answer.get("results") or answer.get("data") or answer.get("rankings")
    names = ("score", "relevance_score", "logit")
    return [(each["index"], next(each[name] for name in names if name in each)) for each in answer]


def test_every_path_is_tested() -> None:
    assert set(REQUESTS) == set(DIALECTS)


@pytest.mark.parametrize("path", sorted(REQUESTS))
def test_the_order_and_scores_are_the_local_scorers(path: str, client: httpx.Client, local: Scorer) -> None:
    ranked = local.rank(QUERY, PASSAGES)
    response = client.post(path, json=REQUESTS[path])
    assert response.status_code == 200
    is_raw = path.endswith(("ranking", "/rank"))
    expected = [(passage.index, passage.score if is_raw else sigmoid(passage.score)) for passage in ranked]
    found = scores_of(response.json())
    if path.endswith("score"):  # in input order
        expected.sort()
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert sorted(index for index, _ in found) == list(range(len(PASSAGES)))
    assert response.headers["x-truncated-documents"] == "1"
    assert response.headers["content-type"] == "application/json"


def test_requests_and_responses_of_real_clients(client: httpx.Client) -> None:
    body = {
        **COHERE,
        "model": "rerank-v3.5",
        "top_n": None,
        "max_tokens_per_doc": None,
        "return_documents": "true",
        "nobody": {"knows": ["this"]},
    }
    response = client.post("/v2/rerank", json=body, headers={"authorization": "Bearer whatever"})
    answer = response.json()
    assert set(answer) >= {"id", "model", "object", "results", "usage", "meta"}
    assert (answer["object"], answer["model"]) == ("rerank", "rerank-v3.5")
    assert answer["meta"]["tokens"]["input_tokens"] == answer["usage"]["total_tokens"] > 0
    assert answer["id"] == response.headers["x-request-id"]
    assert [PASSAGES[each["index"]] for each in answer["results"]] == [
        each["document"]["text"] for each in answer["results"]
    ]
    assert [each["index"] for each in answer["results"] if "truncated" in each] == [4]
    assert "1 of 6 documents were truncated" in answer["meta"]["warnings"][0]
    assert None not in answer["results"][0].values()
    whole = client.post("/v2/rerank", json={**body, "documents": PASSAGES[:2]}).json()
    assert "warnings" not in whole["meta"]


def test_a_request_without_a_model_is_answered_with_that_of_the_server(
    client: httpx.Client, local: Scorer
) -> None:
    assert client.post("/v1/rerank", json=COHERE).json()["model"] == Path(local.config.model).name


def test_a_connection_is_used_again(open_url: str) -> None:
    body = json.dumps(COHERE).encode()
    connection = http.client.HTTPConnection(open_url.removeprefix("http://"), timeout=30)
    connection.connect()
    used = connection.sock
    for _ in range(3):
        connection.request("POST", "/v1/rerank", body)
        response = connection.getresponse()
        assert (response.status, response.headers["connection"]) == (200, None)
        response.read()
        assert connection.sock is used
    connection.close()


@pytest.mark.parametrize(
    "text", ["", " \n", "\u0000\u0001", "</s><s>", "🐼" * 50, "\ud800 alone", "\u202eabc", "\u0f00"]
)
def test_odd_texts_come_back(text: str, client: httpx.Client) -> None:
    body = {"query": f"what is {text}?", "documents": [text, "a"], "return_documents": True}
    response = client.post("/v1/rerank", content=json.dumps(body))
    assert response.status_code == 200
    assert {each["document"]["text"] for each in json.loads(response.content)["results"]} == {text, "a"}


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", "wrong", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xe9"],
)
@pytest.mark.parametrize("path", ["/rerank", "/v1/rank", "/v1/models", "/openapi.json"])
def test_a_wrong_key(path: str, authorization: str | None, keyed_url: str) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    method = "POST" if path in DIALECTS else "GET"
    response = httpx.request(method, keyed_url + path, json=COHERE, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    body = response.json()
    assert body["message"] == body["detail"] == "the API key is missing or wrong"
    assert body["error_type"] == "Unauthorized"
    assert KEY not in response.text


def test_the_right_key(keyed_url: str) -> None:
    for authorization in (f"Bearer {KEY}", f"bearer  {KEY}", KEY):
        headers = {"authorization": authorization}
        assert httpx.post(keyed_url + "/v1/rerank", json=COHERE, headers=headers).status_code == 200
        assert httpx.get(keyed_url + "/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):  # need none
        assert httpx.get(keyed_url + path).status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"CANARY", "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b'{"query": "CANARY", "documents": [NaN]}', "not valid JSON"),
        (b'{"query": "CANARY\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"top_n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"query": "CANARY"}', "'documents' is missing"),
        (b'{"query": "CANARY", "documents": ["a", 1]}', "item 1 of 'documents'"),
    ],
)
def test_malformed_bodies(content: bytes, message: str, client: httpx.Client) -> None:
    response = client.post("/v1/rerank", content=content)
    assert response.status_code == 400
    body = response.json()
    assert message in body["message"]
    assert body["detail"] == body["error"]["message"] == body["message"]
    assert "CANARY" not in response.text


def test_malformed_bodies_in_the_format_of_tei_get_status_422(client: httpx.Client) -> None:
    response = client.post("/rerank", json={"query": "CANARY", "texts": "CANARY"})
    assert response.status_code == 422
    assert (response.json()["error_type"], type(response.json()["error"])) == ("Validation", str)
    assert "CANARY" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/CANARY", 404), ("GET", "/rerank", 405), ("POST", "/health", 405), ("POST", "/rerank/", 404)],
)
def test_wrong_paths_and_methods(method: str, path: str, status: int, client: httpx.Client) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert {"message", "detail", "error"} <= set(response.json())
    assert "x-request-id" in response.headers
    assert "CANARY" not in response.text


def chunks(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("kind", ["declared", "chunked", "gzip", "gzip bomb", "deflate", "concatenated gzip"])
def test_a_body_that_is_too_large(kind: str, held: HeldScorer, held_client: httpx.Client) -> None:
    held.is_held = False
    large, small = b" " * 200_000, json.dumps({"query": "q", "documents": ["1"]}).encode()
    bodies: dict[str, tuple[Any, str]] = {
        "declared": (large, ""),
        "chunked": (chunks(200_000), ""),
        "gzip": (gzip.compress(large), "gzip"),
        "gzip bomb": (gzip.compress(b" " * 100_000_000), "gzip"),
        "deflate": (zlib.compress(large), "deflate"),
        "concatenated gzip": (b"".join(gzip.compress(b" " * 2000) for _ in range(10)), "gzip"),
    }
    content, encoding = bodies[kind]
    headers = {"content-encoding": encoding} if encoding else {}
    response = held_client.post("/v1/rerank", content=content, headers=headers)
    assert response.status_code == 413
    assert "larger than 10485 bytes" in response.json()["message"]
    assert held_client.post("/v1/rerank", content=small).status_code == 200  # the server goes on


async def test_a_declared_size_of_thousands_of_digits_is_too_large() -> None:
    """uvicorn with h11 refuses such a header itself, other servers may not."""

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    with pytest.raises(Refusal, match="larger than 10 bytes") as caught:
        await read_body(receive, {"content-length": "9" * 5000}, 10)
    assert caught.value.status == 413


def test_a_client_that_expects_100_continue(held: HeldScorer, held_client: httpx.Client) -> None:
    """The server responds before the body arrives, and closes the connection, so that the body is not read as a request."""
    head = b"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\nexpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", held_client.base_url.port or 0)) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    ("headers", "messages", "expected"),
    [
        (
            [],
            [{"body": b"{", "more_body": True}, {"body": b"}", "more_body": True}, {"body": b""}],
            ["start", "body", "read", "read", "read", "end"],
        ),
        (
            [],
            [{"body": b"{", "more_body": True}, {"type": "http.disconnect"}],
            ["start", "body", "read", "read", "end"],
        ),
        ([(b"expect", b"100-continue")], [], ["start", "end"]),
    ],
    ids=["sent", "disconnected", "not asked for"],
)
async def test_a_body_that_a_client_sends_is_read_before_the_response_ends(
    headers: list[Any], messages: list[dict[str, Any]], expected: list[str], held: HeldScorer
) -> None:
    """Closing a connection with unread data resets it, and the client might lose the response."""
    app: Any = create_app(held, ServerSettings(api_key=KEY))  # type: ignore[arg-type]
    waiting = iter(messages)
    happened: list[str] = []

    async def receive() -> dict[str, Any]:
        happened.append("read")
        return {"type": "http.request", **next(waiting)}

    async def send(message: dict[str, Any]) -> None:
        kind = message["type"].removeprefix("http.response.")
        happened.append("end" if kind == "body" and not message["more_body"] else kind)
        if kind == "start":
            assert (message["status"], dict(message["headers"])[b"connection"]) == (401, b"close")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/rerank",
        "headers": headers,
        "query_string": b"",
    }
    await app(scope, receive, send)
    assert happened == expected


def test_a_client_that_offers_another_protocol(client: httpx.Client) -> None:
    """Java's HTTP client offers HTTP/2 with every request to an address without TLS."""
    body = json.dumps(COHERE).encode()
    head = (
        b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings, close\r\n"
        b"upgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as connection:
        connection.sendall(head + body)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200"), answer


def test_a_request_with_too_many_documents_is_refused(client: httpx.Client) -> None:
    body = {"query": "q", "documents": [""] * (MAX_PAIRS_OF_REQUEST + 1)}
    response = client.post("/v1/rerank", json=body)
    assert (response.status_code, response.json()["type"]) == (413, "TooManyDocuments")
    assert "20001 documents; the server's limit is 20000" in response.json()["message"]
    requests = [["q", [""] * 15_000], ["r", [""] * 15_000]]
    assert client.post("/v1/rank", json={"requests": requests}).status_code == 413


@pytest.mark.parametrize("first", [50, 100])
def test_the_parts_of_a_concatenated_body_share_the_limit(first: int) -> None:
    data = gzip.compress(b"x" * first) + gzip.compress(b"y" * 1_000_000)
    assert len(_Compressed().unpack(data, 100)) == 100


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_compressed_body(pack: Any, client: httpx.Client) -> None:
    encoding = {"content-encoding": "gzip" if pack is gzip.compress else "deflate"}
    content = pack(json.dumps(COHERE).encode())
    assert client.post("/v1/rerank", content=content, headers=encoding).status_code == 200
    for damaged in (b"", content[:5], content[:-9], b"x" + content, content[:20] + b"xx" + content[22:]):
        response = client.post("/v1/rerank", content=damaged, headers=encoding)
        assert response.status_code == 400
        assert "compressed request body" in response.json()["message"]
    response = client.post("/v1/rerank", content=content, headers={"content-encoding": "br"})
    assert response.status_code == 415
    response = client.post("/v1/rerank", content=content + pack(b"") * 10_000, headers=encoding)
    assert response.status_code == 400


def test_a_full_queue(held: HeldScorer, held_client: httpx.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(held_client.post, "/rerank", json={"query": "q", "texts": ["1 " * 1000]})
        wait_until(lambda: held.num_calls == 1)
        durations = []
        for path, body in REQUESTS.items():
            if "1 " in str(body):
                continue
            started = time.perf_counter()
            response = held_client.post(path, json={**body, **_few(path)})
            durations.append(time.perf_counter() - started)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert "tokens are waiting" in response.json()["message"]
        assert sorted(durations)[len(durations) // 2] < 0.1  # 10 ms where the machine is idle
        held.is_held = False
        assert first.result().status_code == 200


def _few(path: str) -> dict[str, Any]:
    """Return fields that make a request fit the small body limit."""
    few = ["1", "2"]
    return {
        "documents": few,
        "texts": few,
        "text_2": few,
        "passages": few,
        "requests": [["q", few]],
    }


def test_a_disconnected_client_cancels_its_work(
    held: HeldScorer, held_client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bge_rerank_integrations")
    with pytest.raises(httpx.ReadTimeout):
        held_client.post("/rerank", json={"query": "q", "texts": ["1"]}, timeout=0.3)
    wait_until(lambda: held.num_cancelled == 1)
    assert held.queued_tokens == 0
    wait_until(lambda: ": disconnected, " in caplog.text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_request_that_takes_too_long(held: HeldScorer) -> None:
    with (
        running(create_app(held, ServerSettings(timeout_s=0.2))) as url,  # type: ignore[arg-type]
        httpx.Client(base_url=url) as client,
    ):
        response = client.post("/v1/rerank", json={"query": "q", "documents": ["1"]})
        assert (response.status_code, response.json()["type"]) == (504, "RequestTimeoutError")
        wait_until(lambda: held.num_cancelled == 1)
        body = {"requests": [["q", ["1"]]], "timeout_s": 0.01}
        assert "0.01 s" in client.post("/v1/rank", json=body).json()["message"]
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as slow:
            slow.sendall(b"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_slow_senders_and_idle_connections_do_not_stop_others(
    held: HeldScorer, held_client: httpx.Client
) -> None:
    held.is_held = False
    address = ("127.0.0.1", held_client.base_url.port or 0)
    connections = [socket.create_connection(address) for _ in range(100)]
    try:
        for connection in connections[::2]:
            connection.sendall(b"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        response = held_client.post("/rerank", json={"query": "q", "texts": ["1"]})
        assert response.status_code == 200
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (NonFiniteScoreError("the model's score of pair 0 is not finite", index=0), 500, "Backend"),
        (WorkerDiedError("ended"), 503, "Unhealthy"),
        (DeviceLostError("lost"), 503, "Unhealthy"),
        (ScorerClosedError("closed"), 503, "Unhealthy"),
        (RequestTimeoutError("slow"), 504, "Backend"),
        (RuntimeError("CANARY"), 500, "Backend"),
    ],
)
def test_failures_of_the_scorer(
    error: Exception, status: int, error_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    held = HeldScorer(is_held=False)
    held.error = error
    with TestClient(create_app(held)) as client:  # type: ignore[arg-type]
        response = client.post("/v1/rerank", json={"query": "q", "documents": ["CANARY"]})
    assert (response.status_code, response.json()["error_type"]) == (status, error_type)
    assert "CANARY" not in response.text + caplog.text
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == (status == 500), "only an unexpected error is an error of the server"


def test_health_and_metrics(local: Scorer, open_url: str) -> None:
    httpx.post(open_url + "/v1/rerank", json=COHERE)
    health = httpx.get(open_url + "/health/ready")
    assert (health.status_code, health.json()) == (
        200,
        {"status": "ok", "queued_requests": 0, "queued_tokens": 0},
    )
    metrics = httpx.get(open_url + "/metrics")
    name = Path(local.config.model).name  # anybody may read the metrics, so they do not contain the path
    assert metrics.headers["content-type"].startswith("text/plain")
    assert f'bge_rerank_up{{model="{name}"}} 1.0' in metrics.text
    assert f'bge_rerank_pairs_total{{model="{name}"}}' in metrics.text


def test_health_of_a_lost_device_and_of_a_drain() -> None:
    held = HeldScorer()
    app = create_app(held)  # type: ignore[arg-type]
    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 200
        app.state.service.begin_drain()
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        response = client.post("/v1/rerank", json={"query": "q", "documents": ["1"]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        held.state = "device lost"
        assert client.get("/health/live").status_code == 503


def test_models_are_listed_without_their_folder() -> None:
    for settings, name in ((None, "held"), (ServerSettings(model_name="bge"), "bge")):
        with TestClient(create_app(HeldScorer(), settings)) as client:  # type: ignore[arg-type]
            (model,) = client.get("/v1/models").json()["data"]
            assert (model["id"], model["object"]) == (name, "model")


def test_the_openapi_document_has_every_path(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(DIALECTS) <= set(document["paths"])
    operation = document["paths"]["/v1/rerank"]["post"]
    schemas = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [schema["title"] for schema in schemas] == ["tei", "voyage", "rerank"]
    assert {"200", "400", "401", "413", "429", "503"} <= set(operation["responses"])
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert "401" not in document["paths"]["/metrics"]["get"]["responses"]
    assert set(document["paths"]["/metrics"]["get"]["responses"]) == {"200"}
    assert "loaded" in document["paths"]["/health/ready"]["get"]["responses"]["503"]["description"]
    read_only = {path for path, methods in document["paths"].items() if "get" in methods}
    assert read_only == {
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/models",
        "/openapi.json",
        "/v1/models",
    }
    schema = document["components"]["schemas"]["Refusal"]
    refused = client.post("/v1/rerank", json={}).json()
    assert set(schema["required"]) == set(refused) <= set(schema["properties"])


def test_scores_without_a_ranking_claim_no_counts(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bge_rerank_integrations")
    body = {"requests": [["q", ["a", "word " * 1000]]], "only_scores": True}
    response = client.post("/v1/rank", json=body)
    (ranking,) = response.json()["rankings"]
    assert [set(passage) for passage in ranking["passages"]] == [{"index", "score"}] * 2
    assert (ranking["counts"], "x-truncated-documents" in response.headers) == ({}, False)
    wait_until(lambda: ": 200, 2 pairs, " in caplog.text)
    assert not re.search(r"tokens|truncated", caplog.text)


def test_request_ids(client: httpx.Client) -> None:
    for given, is_kept in (("abc-1.2_3", True), ("two words", False), ("x" * 65, False), ("", False)):
        for path in ("/v1/rerank", "/nowhere"):
            response = client.post(
                path, json={"query": "q", "documents": []}, headers={"x-request-id": given}
            )
            assert (response.headers["x-request-id"] == given) == is_kept


def test_logs_hold_no_text(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for content in (
        json.dumps({"query": "CANARY", "documents": ["CANARY"], "model": "CANARY"}),
        json.dumps({"query": "CANARY", "documents": ["CANARY", 5]}),
        "CANARY",
    ):
        response = client.post("/v1/rerank?CANARY=CANARY", content=content, headers={"x-request-id": "id-1"})
        assert "x-request-id" in response.headers
    wait_until(lambda: caplog.text.count("id-1 /v1/rerank rerank: ") == 3)
    # Ignore the logs of the clients, and the access log of uvicorn, which only tests switch on.
    others = ("httpx", "httpcore", "uvicorn.access")
    own = [record for record in caplog.records if not record.name.startswith(others)]
    assert not any("CANARY" in record.getMessage() for record in own)
    assert any("200, 1 pairs" in record.getMessage() for record in own)


def test_spans(local: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda *args, **kwargs: provider.get_tracer("test"))
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    with TestClient(create_app(local)) as client:
        client.post("/v1/rerank", json=COHERE, headers={"traceparent": parent})
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/rerank"
    assert span.context is not None
    assert format(span.context.trace_id, "032x") == "0123456789abcdef0123456789abcdef"
    attributes = span.attributes or {}
    assert (attributes["bge_rerank.num_pairs"], attributes["http.response.status_code"]) == (6, 200)
    assert QUERY not in str(span.to_json())


def test_a_scorer_that_normalizes_is_refused(checkpoint: Path) -> None:
    with (
        Scorer(checkpoint, device="cpu", dtype="float32", normalize=True) as normalizing,
        pytest.raises(ConfigError, match="normalize=False"),
    ):
        create_app(normalizing)


@pytest.mark.parametrize("raw", [{"raw_scores": True}, {"use_activation": False}])
def test_raw_scores_and_rank_fields_work_with_top_k_too(
    client: httpx.Client, local: Scorer, raw: dict[str, bool]
) -> None:
    documents = [{"title": "a", "text": "b"}, {"title": "c"}]
    body = {"query": "q", "documents": documents, "rank_fields": ["title"], "top_k": 1, **raw}
    (result,) = client.post("/v1/rerank", json=body).json()["results"]
    best = local.rank("q", ["a", "c"], top_n=1)[0]
    assert (result["index"], result["relevance_score"]) == (best.index, pytest.approx(best.score, abs=1e-5))
