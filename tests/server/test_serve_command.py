"""`bge-rerank serve` as a process: starting, refusing to start, and ending."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from bge_rerank_integrations.cli.app import main
from tests.support.hub import running_hub
from tests.support.serve_command import PATIENCE_S, serving
from tests.support.servers import wait_until

KEY = "KEY-CANARY-5678"
BODY = {"query": "TEXT-CANARY", "documents": ["TEXT-CANARY one", "two"]}


def test_it_serves_and_ends_at_a_signal(checkpoint: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n", encoding="utf-8-sig")
    with serving(
        "--model", str(checkpoint), "--device", "cpu", "--api-key-file", str(key_file), "--model-name", "bge"
    ) as server:
        assert httpx.get(server.url + "/health/live").status_code == 200
        server.wait_until_ready()
        assert httpx.post(server.url + "/v1/rerank", json=BODY).status_code == 401
        headers = {"authorization": f"Bearer {KEY}"}
        response = httpx.post(server.url + "/v1/rerank?q=TEXT-CANARY", json=BODY, headers=headers)
        assert (response.status_code, response.json()["model"]) == (200, "bge")
        httpx.post(server.url + "/v1/rerank", content=b"TEXT-CANARY", headers=headers)
        with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0)) as idle:
            idle.sendall(b"TEXT-CANARY no HTTP\r\n\r\n")
            idle.recv(1000)
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == 0
        assert "200, 2 pairs" in server.output
        assert "CANARY" not in server.output


@pytest.mark.parametrize("grace_s", [30.0, 0.2])
def test_accepted_requests_are_finished_or_get_status_503(grace_s: float, checkpoint: Path) -> None:
    """Requests that run at SIGTERM get their scores, or status 503 after the grace period. The exit status is 0."""
    # A batch has one sequence, so that the requests take long.
    slow = ["--model", str(checkpoint), "--device", "cpu", "--max-batch-tokens", "1", "--num-threads", "1"]
    body = {"query": "q", "documents": [f"word{number} " * 400 for number in range(60)]}
    answers: list[httpx.Response] = []
    with serving(*slow, "--grace-s", str(grace_s)) as server:
        server.wait_until_ready()

        def ask() -> None:
            answers.append(httpx.post(server.url + "/v1/rerank", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url) as client:
            wait_until(lambda: client.get("/health/ready").json()["queued_tokens"] > 20_000)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "shutting down" in server.output)
            if grace_s > 1:  # while the accepted ones are finished, others are refused with a reason
                assert client.get("/health/ready").status_code == 503
                refused = client.post("/v1/rerank", json=BODY)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert refused.headers["connection"] == "close"
        for thread in threads:
            thread.join()
        assert server.end() == 0
    assert len(answers) == 4
    if grace_s > 1:
        # A request after the signal is refused. A request that was accepted before it is always finished.
        finished = [answer for answer in answers if answer.status_code == 200]
        refused_late = [answer for answer in answers if answer.status_code != 200]
        assert finished
        assert all(len(answer.json()["results"]) == 60 for answer in finished)
        assert {(answer.status_code, answer.json()["message"]) for answer in refused_late} <= {
            (503, "the server is shutting down")
        }
    else:
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert 503 in {answer.status_code for answer in answers}
        assert all(answer.json() for answer in answers)


def test_a_second_signal_ends_the_accepted_requests(checkpoint: Path) -> None:
    slow = ["--model", str(checkpoint), "--device", "cpu", "--max-batch-tokens", "1", "--num-threads", "1"]
    body = {"query": "q", "documents": [f"word{number} " * 400 for number in range(400)]}
    answers: list[httpx.Response] = []
    with serving(*slow, "--grace-s", "60") as server:
        server.wait_until_ready()
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(server.url + "/v1/rerank", json=body, timeout=60))
        )
        thread.start()
        with httpx.Client(base_url=server.url) as client:
            wait_until(lambda: client.get("/health/ready").json()["queued_tokens"] > 10_000)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: "for at most 60 s" in server.output)
        server.process.send_signal(signal.SIGINT)
        thread.join()
        assert server.end() == 0
        assert "Traceback" not in server.output
        assert server.output.count("were not finished in time") == 1
        assert "1 request(s) were not finished in time" in server.output
    assert [(answer.status_code, answer.json()["type"]) for answer in answers] == [(503, "ServerDraining")]


def test_an_idle_connection_stays_open_longer_than_clients_keep_it(checkpoint: Path) -> None:
    """httpx reuses a connection for 5 seconds, which is also when uvicorn closes one by default."""
    with serving("--model", str(checkpoint), "--device", "cpu") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        connection.auto_open = 0  # so that a closed connection is an error
        connection.connect()
        for pause_s in (7.0, 0.0):
            connection.request("GET", "/health/live")
            assert connection.getresponse().read()
            time.sleep(pause_s)
        connection.close()


def test_a_signal_while_the_model_is_loaded(checkpoint: Path) -> None:
    with serving("--model", str(checkpoint), "--device", "cpu", "--grace-s", "0.1") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


INTERRUPTED_START = """
    import os, signal, time
    from bge_rerank_integrations.server.run import run_server
    from bge_rerank_integrations.server.settings import ServerSettings

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal

    def load():
        os.kill(os.getpid(), signal.{signal})  # before uvicorn has its signal handlers
        time.sleep(60)

    run_server(load, ServerSettings(), host="127.0.0.1", port=0, grace_s=1, on_listening=print)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_server_listens(name: str) -> None:
    code = textwrap.dedent(INTERRUPTED_START).format(signal=name)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (run.returncode, run.stderr) == (0, "")


FAILED_START = """
    from bge_rerank_integrations.server.run import run_server
    from bge_rerank_integrations.server.settings import ServerSettings

    def load():
        raise KeyError("model")

    try:
        run_server(load, ServerSettings(), host="127.0.0.1", port=0, grace_s=1, on_listening=print)
    except KeyError:
        print("failed")
"""


def test_a_load_that_fails_before_the_server_listens() -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FAILED_START)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (run.returncode, run.stdout.split()[-1:], run.stderr) == (0, ["failed"], "")


def test_clients_that_have_not_sent_their_body_get_status_503(checkpoint: Path) -> None:
    body = json.dumps(BODY).encode()
    with serving("--model", str(checkpoint), "--device", "cpu") as server:
        server.wait_until_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as client:
            client.sendall(
                b"POST /v1/rerank HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:-5]
            )
            with httpx.Client(base_url=server.url) as other:
                assert other.get("/health/live").status_code == 200  # the server has read the first bytes
            server.process.send_signal(signal.SIGTERM)
            response = http.client.HTTPResponse(client)
            response.begin()
            assert (response.status, response.headers["retry-after"]) == (503, "1")
            assert json.loads(response.read())["type"] == "ServerDraining"
        assert server.end() == 0
        assert "Traceback" not in server.output


def test_a_signal_while_the_model_is_downloaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that nobody needs any more does not hold up the end."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_hub({"team/reranker": checkpoint}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.stalls = {"model.safetensors"}
        with serving("--model", "team/reranker", "--device", "cpu", "--grace-s", "200") as server:
            wait_until(lambda: "model.safetensors" in hub.downloads, PATIENCE_S)
            assert httpx.get(f"{server.url}/health/live").status_code == 200
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            started = time.monotonic()
            server.process.terminate()
            assert server.end() == 0
            assert time.monotonic() - started < 100
            assert "Fetching" not in server.output, "progress bars are for terminals"
        hub.stalls = set()


def test_an_ipv6_address_may_have_brackets() -> None:
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("needs IPv6")
    with taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", "--model", "embedded", "--host", "[::1]", "--port", port])
    assert result.exit_code == 2
    assert "cannot listen on '::1'" in result.output


def test_the_address_for_all_interfaces_takes_both_protocols(checkpoint: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    with serving("--model", str(checkpoint), "--device", "cpu", "--host", "::", "--no-auth") as server:
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{server.port}/health/live").status_code == 200


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    with serving("--model", str(tmp_path)) as server:
        assert server.end() == 1
        assert "Error: " in server.output
        assert "Traceback" not in server.output


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--model", "embedded", "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on '127.0.0.1', port {port}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "is not a loopback address"),
        (["--host", "::"], "is not a loopback address"),
        (["--host", "example.org"], "is not a loopback address"),
        (["--host", "\u00e9" * 70, "--no-auth"], "cannot listen"),
        (["--api-key-file", "/no/such/file"], "does not exist"),
        (["--timeout-s", "0"], "--timeout-s must be a positive number"),
        (["--timeout-s", "nan"], "--timeout-s must be a positive number"),
        (["--grace-s", "-1"], "--grace-s must be a positive number"),
        (["--grace-s", "1e12"], "--grace-s must be a positive number of seconds, at most 31536000"),
        (["--max-body-mib", "0"], "--max-body-mib must be a positive number"),
        (["--max-queued-tokens", "0"], "max-queued-tokens"),
        (["--max-wait-ms", "-1"], "--max-wait-ms"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BGE_RERANK_API_KEY", raising=False)
    result = CliRunner().invoke(main, ["serve", "--model", "embedded", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_wrong_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    for content, message in (
        (b"", "is empty"),
        (b"\xff", "cannot be read"),
        (b"CANARY two", "printable ASCII"),
    ):
        file.write_bytes(content)
        result = CliRunner().invoke(main, ["serve", "--api-key-file", str(file)])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert "CANARY" not in result.output
    monkeypatch.setenv("BGE_RERANK_API_KEY", KEY)
    result = CliRunner().invoke(main, ["serve", "--no-auth"])
    assert result.exit_code == 2
    assert "--no-auth contradicts" in result.output


@pytest.mark.parametrize("library", ["starlette.applications", "uvicorn"])
def test_a_missing_extra_is_named_with_its_command(library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from bge_rerank_integrations.cli.app import main; main(['serve', '--model', 'embedded'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'pip install "bge-rerank-integrations[server]"' in " ".join(run.stderr.split())
