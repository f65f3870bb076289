"""Contenders that are servers in processes of their own."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.models import Setup
from benchmarks.peers.contender import NotAvailableError
from benchmarks.serving.in_process import medians_in_turn
from benchmarks.serving.loads import Contender, Request
from bge_rerank_integrations import Scorer

# Loading a large model on a busy machine takes minutes.
START_LIMIT_S: Final = 600.0
REQUEST_LIMIT_S: Final = 600.0
NUM_SMALL_REQUESTS: Final = 300
# Both servers are told not to reach for the hub, and infinity_emb not to send usage statistics.
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    "PYTHONUNBUFFERED": "1",
}


class HttpClient:
    """Posts requests to one server. Each thread keeps its own connection open.

    It uses the standard library's client, since the larger ones take longer than a server needs to answer.

    Args:
        port: Port of the server on the loopback interface.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._own = threading.local()

    def rank(self, request: Request) -> list[float]:
        """Return the probability of each passage, in the order of the passages.

        Raises:
            RuntimeError: The server refused the request.
        """
        query, passages = request
        status, content = self.post(
            "/rerank", json.dumps({"query": query, "documents": passages, "return_documents": False}).encode()
        )
        if status != 200:
            raise RuntimeError(f"status {status}")
        scores = [0.0] * len(passages)
        for result in json.loads(content)["results"]:
            scores[result["index"]] = result["relevance_score"]
        return scores

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a response."""
        try:
            return self._post(path, body)
        except (http.client.RemoteDisconnected, ConnectionError):
            self._own.connection.close()  # the server closed an idle connection; the next try opens another
            return self._post(path, body)

    def is_healthy(self) -> bool:
        """Return whether the server answers its health check."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(
                "127.0.0.1", self._port, timeout=REQUEST_LIMIT_S
            )
        connection: http.client.HTTPConnection = self._own.connection
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def load_ours(setup: Setup, stack: ExitStack) -> Contender:
    """Start `bge-rerank serve`."""
    command = [sys.executable, "-m", "bge_rerank_integrations.cli", "serve", "--model", setup.model]
    options = ["--device", setup.device, "--dtype", "float32"]
    return _start("bge-rerank serve", lambda port: [*command, *options, "--port", str(port)], stack)


def load_app(setup: Setup, stack: ExitStack) -> Contender:
    """Start a plain web application around `CrossEncoder`."""
    import sentence_transformers  # noqa: F401  # raise here if it is missing, not in the child process

    command = [sys.executable, "-m", "benchmarks.peers.plain_app", str(setup.plain), setup.device]
    return _start("CrossEncoder behind a lock, Starlette", lambda port: [*command, str(port)], stack)


def load_infinity(setup: Setup, stack: ExitStack, python: Path | None) -> Contender:
    """Start `infinity_emb` with its torch engine.

    Args:
        setup: The model and the device.
        stack: Ends the server.
        python: The interpreter of the environment that `infinity_emb` is installed in.

    Raises:
        NotAvailableError: There is no interpreter, or it has no `infinity_emb`.
    """
    if python is None:
        raise NotAvailableError(
            "pip install 'infinity_emb[server,torch]' into an environment of its own, and pass its "
            "interpreter with --infinity"
        )
    code = "import importlib.metadata as m; print(m.version('infinity_emb'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise NotAvailableError(f"{python} has no infinity_emb")
    command = [str(python), "-c", "from infinity_emb.cli import cli; cli()", "v2"]
    options = [
        *("--model-id", str(setup.plain), "--engine", "torch", "--device", setup.device.partition(":")[0]),
        *("--dtype", "float32", "--host", "127.0.0.1", "--log-level", "warning", "--no-bettertransformer"),
    ]
    name = f"infinity_emb {found.stdout.strip()}, torch"
    return _start(name, lambda port: [*command, *options, "--port", str(port)], stack)


def http_cost(setup: Setup, server: Contender, request: Callable[[], Request]) -> dict[str, float]:
    """Time small requests over HTTP and through `Scorer.rank` of this process, in turn.

    Returns:
        Median milliseconds of each, and their difference.
    """
    with Scorer(setup.model, device=setup.device, dtype="float32") as scorer:
        medians = medians_in_turn(
            {"http_ms": lambda: server.ask(request()), "rank_ms": lambda: scorer.rank(*request())},
            NUM_SMALL_REQUESTS,
        )
    medians = {name: 1000 * seconds for name, seconds in medians.items()}
    return {**medians, "added_ms": medians["http_ms"] - medians["rank_ms"]}


def _start(name: str, command: Callable[[int], Sequence[str]], stack: ExitStack) -> Contender:
    port = _free_port()
    # A file takes any amount of output. A pipe that nobody reads would block the server.
    errors = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
    process = subprocess.Popen(
        command(port),
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )
    stack.callback(_end, process)
    client = HttpClient(port)
    deadline = time.monotonic() + START_LIMIT_S
    while not client.is_healthy():
        if process.poll() is not None or time.monotonic() > deadline:
            line = " ".join(map(str, command(port)))
            raise NotAvailableError(f"the server did not start: {line}: {_last_line(errors)}")
        time.sleep(0.2)
    return Contender(name, client.rank)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing to stderr"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
