"""Much load for long: nothing is lost, idle and slow clients stop nobody, memory does not grow.

The sizes of the default run are small. `sh scripts/test -m stress tests/server -s` takes the full sizes, and
prints the figures.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from bge_rerank_integrations import Scorer
from tests.server.conftest import KEY
from tests.support.serve_command import Server, serving
from tests.support.tolerances import LOGIT_TOLERANCE

QUERY = "what does a giant panda eat?"
RIGHT = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
GRACE_S = 30.0
TIMEOUT_S = 300.0  # not even a busy machine takes so long for one request
MAX_BODY_BYTES = 64 * 1024
TOLERANCE = max(LOGIT_TOLERANCE.values())


def full(*values: Any) -> Any:
    """Return parameters of the full size, which run only with `-m stress`."""
    return pytest.param(*values, marks=pytest.mark.stress)


# Nothing is lost.


@dataclass
class Ends:
    """How requests ended. Each has an id, which the server logs.

    Attributes:
        counts: Number of requests by kind and end.
        num_refused: Number of times that a request was refused by the restart and sent again.
        ranked: Ids of the requests whose scores arrived.
        unanswered: Ids of the requests whose connection closed without a response.
    """

    counts: Counter[str] = field(default_factory=Counter)
    ranked: set[str] = field(default_factory=set)
    unanswered: set[str] = field(default_factory=set)
    num_refused: int = 0


def kinds_of_requests(num_requests: int) -> list[str]:
    """Return a kind for each request, in random order: mostly right ones, and each way to go wrong."""
    shares = {"gone": 0.03, "malformed": 0.02, "large": 0.005, "stranger": 0.002}
    kinds = [kind for kind, share in shares.items() for _ in range(max(round(share * num_requests), 2))]
    kinds += ["right"] * (num_requests - len(kinds))
    random.Random(0).shuffle(kinds)
    return kinds


class Clients:
    """Clients that send every kind of request until none is left, and reconnect when the server restarts."""

    def __init__(self, url: str, logits: dict[str, float], num_requests: int) -> None:
        self.ends = Ends()
        self.url = url
        self.is_halfway = asyncio.Event()
        self.is_restarting = False
        self._half = num_requests // 2
        self._kinds = iter(enumerate(kinds_of_requests(num_requests)))
        self._texts = list(logits)
        self._logits = logits

    async def run(self, num_clients: int) -> None:
        async with httpx.AsyncClient(
            base_url=self.url, timeout=3 * TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        ) as client:
            await asyncio.gather(*(self._work(client) for _ in range(num_clients)))

    async def _work(self, client: httpx.AsyncClient) -> None:
        for number, kind in self._kinds:
            await self._send(client, f"request-{number}", kind, random.Random(number))
            if sum(self.ends.counts.values()) >= self._half:
                self.is_halfway.set()

    async def _send(self, client: httpx.AsyncClient, name: str, kind: str, choose: random.Random) -> None:
        passages = choose.choices(self._texts, k=choose.randint(1, 8))
        body = json.dumps({"query": QUERY, "documents": passages, "raw_scores": True}).encode()
        if kind == "gone":
            await self._leave_early(name, body, choose.uniform(0, 0.02))
            return
        content, headers, expected = {
            "right": (body, RIGHT, 200),
            "malformed": (choose.choice([body[:-1], b"[]", b"\xff", b'{"query": 3}', b""]), RIGHT, 400),
            "large": (body + b" " * MAX_BODY_BYTES, RIGHT, 413),
            "stranger": (body, {**RIGHT, "authorization": "Bearer wrong"}, 401),
        }[kind]
        while True:
            try:
                response = await client.post(
                    "/v1/rerank", content=content, headers={**headers, "x-request-id": name}
                )
            except httpx.ConnectError:
                assert self.is_restarting
                await asyncio.sleep(0.05)  # nobody has seen this request, so it is sent again
                continue
            except httpx.TransportError:
                if not self.is_restarting:
                    raise
                self.ends.unanswered.add(name)
                self.ends.counts["connection closed by the restart"] += 1
                return
            answer = response.json()
            if response.status_code != 503:
                break
            assert self.is_restarting
            assert answer["message"] in ("the server is shutting down", "the model is still being loaded")
            self.ends.num_refused += 1
            await asyncio.sleep(int(response.headers["retry-after"]))
        assert response.status_code == expected, answer
        assert response.headers["x-request-id"] == name
        self.ends.counts[f"{kind}: {expected}"] += 1
        if kind == "right":
            self.ends.ranked.add(name)
            found = {result["index"]: result["relevance_score"] for result in answer["results"]}
            assert len(answer["results"]) == len(found) == len(passages)
            for index, text in enumerate(passages):
                assert abs(found[index] - self._logits[text]) <= TOLERANCE
        else:
            assert answer["message"]
            assert {"detail", "error", "type"} <= set(answer)

    async def _leave_early(self, name: str, body: bytes, after_s: float) -> None:
        """Send a request, and close the connection before or while it is scored."""
        host, port = httpx.URL(self.url).host, httpx.URL(self.url).port
        head = f"POST /v1/rerank HTTP/1.1\r\nhost: x\r\nauthorization: {KEY}\r\nx-request-id: {name}\r\n"
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            assert self.is_restarting
        else:
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await asyncio.sleep(after_s)
            writer.transport.abort()
        self.ends.counts["gone"] += 1


@pytest.mark.parametrize(("num_requests", "num_clients"), [(400, 16), full(10_000, 64)])
async def test_nothing_is_lost_even_by_a_restart(
    num_requests: int, num_clients: int, checkpoint: Path, texts: list[str], local: Scorer
) -> None:
    logits = {text: passage.score for text in texts for passage in local.rank(QUERY, [text])}
    options = (
        *("--model", str(checkpoint), "--device", "cpu", "--dtype", "float32"),
        *("--max-body-mib", str(MAX_BODY_BYTES / 2**20), "--grace-s", str(GRACE_S)),
        *("--timeout-s", str(TIMEOUT_S)),
    )
    with ExitStack() as stack:
        first = stack.enter_context(serving(*options, key=KEY))
        await asyncio.to_thread(first.wait_until_ready)
        clients = Clients(first.url, logits, num_requests)
        work = asyncio.create_task(clients.run(num_clients))
        await asyncio.wait(
            {work, asyncio.create_task(clients.is_halfway.wait())}, return_when="FIRST_COMPLETED"
        )
        assert not work.done(), work.exception()
        clients.is_restarting = True
        began = time.monotonic()
        first.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(first.end, GRACE_S + 30)
        drained_s = time.monotonic() - began
        second = stack.enter_context(serving(*options, key=KEY, port=first.port))
        await asyncio.to_thread(second.wait_until_ready)
        await work
        async with httpx.AsyncClient(base_url=first.url) as client:
            assert (await client.get("/health/ready")).json()["queued_tokens"] == 0
        output = first.output + second.output
    ends = clients.ends
    logged = dict(re.findall(r"(request-\d+) /v1/rerank \w+: (\w+),", output))
    print(
        f"\n{dict(ends.counts)}; {ends.num_refused} times refused by the restart; drained in {drained_s:.1f} s, "
        f"exit status {status}"
    )
    assert status == 0
    assert drained_s <= GRACE_S + 5
    assert sum(ends.counts.values()) == num_requests
    assert min(ends.counts[kind] for kind in ("right: 200", "malformed: 400", "large: 413", "gone")) > 0
    # What the server says it answered has arrived, and what it did not answer it never took.
    assert ends.ranked == {name for name, end in logged.items() if end == "200"} - clients_gone(num_requests)
    assert not {end for end in logged.values() if end.startswith("5") and end != "503"}
    assert all(logged.get(name, "disconnected") == "disconnected" for name in ends.unanswered)
    assert "Traceback" not in output


def clients_gone(num_requests: int) -> set[str]:
    """Return the ids of the requests whose clients left early."""
    kinds = enumerate(kinds_of_requests(num_requests))
    return {f"request-{number}" for number, kind in kinds if kind == "gone"}


# Idle and slow clients.


@contextmanager
def open_files(at_least: int) -> Iterator[None]:
    """Raise this process's limit of open files, or skip the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < at_least:
        pytest.skip(f"needs {at_least} open files; the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, at_least), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def slow_senders(port: int, count: int) -> AsyncIterator[None]:
    """Keep clients that send one byte of a request every tenth of a second."""

    async def send(writer: asyncio.StreamWriter) -> None:
        head = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
        for byte in head + b" " * 100_000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.1)

    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    tasks = [asyncio.create_task(send(writer)) for _, writer in opened]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for _, writer in opened:
            writer.transport.abort()


@pytest.mark.parametrize(("num_idle", "num_slow", "num_requests"), [(300, 20, 20), full(2000, 100, 500)])
async def test_idle_and_slow_clients_stop_nobody(
    num_idle: int, num_slow: int, num_requests: int, checkpoint: Path
) -> None:
    # The usual soft limit is 1,024 open files. The server needs a file for each connection.
    options = ("--model", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--grace-s", "5")
    with ExitStack() as stack:
        stack.enter_context(open_files(num_idle + num_slow + 1000))
        server = stack.enter_context(serving(*options, max_open_files=min(num_idle, 1024)))
        await asyncio.to_thread(server.wait_until_ready)
        for _ in range(num_idle):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        seconds = []
        async with (
            slow_senders(server.port, num_slow),
            httpx.AsyncClient(base_url=server.url, timeout=30) as client,
        ):
            for number in range(num_requests):
                began = time.perf_counter()
                body = {"query": QUERY, "documents": [f"passage {number}"]}
                response = await client.post("/v1/rerank", json=body)
                seconds.append(time.perf_counter() - began)
                assert response.status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.end) == 0
    print(
        f"\n{num_idle} idle and {num_slow} slow connections: {num_requests} requests, "
        f"p50 {1000 * statistics.median(seconds):.1f} ms, longest {1000 * max(seconds):.1f} ms"
    )


# Memory.


def resident_mib(server: Server) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(("num_warm", "num_requests"), [(500, 2000), full(2000, 20_000)])
def test_memory_does_not_grow(num_warm: int, num_requests: int, checkpoint: Path, texts: list[str]) -> None:
    options = ("--model", str(checkpoint), "--device", "cpu", "--dtype", "float32")
    with serving(*options) as server, ThreadPoolExecutor(8) as pool:
        server.wait_until_ready()
        own = threading.local()

        def send(number: int) -> None:
            if not hasattr(own, "client"):
                own.client = httpx.Client(base_url=server.url, timeout=60)
            choose = random.Random(number)
            # No passage comes twice, and none is as long as another.
            passages = [f"{number} {text}" for text in choose.sample(texts, choose.randint(1, 8))]
            response = own.client.post("/v1/rerank", json={"query": QUERY, "documents": passages})
            assert response.status_code == 200

        sizes = [resident_mib(server)]
        for numbers in (range(num_warm), range(num_warm, num_requests)):
            list(pool.map(send, numbers))
            sizes.append(resident_mib(server))
    loaded, warm, grown = sizes
    print(
        f"\n{loaded:.0f} MiB loaded, {warm:.0f} MiB after {num_warm} requests, {grown:.0f} MiB after "
        f"{num_requests}: {100 * (grown / warm - 1):+.1f} %"
    )
    assert grown <= 1.05 * warm


# Refusals.


@pytest.mark.stress
def test_a_full_queue_refuses_within_10_ms(checkpoint: Path, texts: list[str]) -> None:
    """The median refusal takes at most 10 ms while the model computes; other processes would disturb this."""
    options = ("--model", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--num-threads", "1")
    with serving(*options, "--max-queued-tokens", "20000") as server, ThreadPoolExecutor(6) as pool:
        server.wait_until_ready()
        # The parts of a long request wait for room in the queue, and keep it full.
        passage = " ".join(texts)[:4000]
        body = {"query": QUERY, "documents": [f"{number} {passage}" for number in range(1000)]}
        other = {"query": QUERY, "documents": [f"{number} {passage}" for number in range(20)]}
        end = time.monotonic() + 20

        def occupy() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while time.monotonic() < end:
                    client.post("/v1/rerank", json=body)

        occupied = [pool.submit(occupy) for _ in range(2)]
        refused: list[float] = []

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while time.monotonic() < end:
                    began = time.perf_counter()
                    response = client.post("/v1/rerank", json=other)
                    if response.status_code == 429:
                        refused.append(1000 * (time.perf_counter() - began))
                        assert response.headers["retry-after"] == "1"
                        time.sleep(0.05)

        # An accepted request waits for seconds, so one client alone would be refused too rarely.
        for future in [*occupied, *(pool.submit(ask) for _ in range(4))]:
            future.result()
    assert len(refused) > 50
    print(f"\n{len(refused)} refusals: {percentiles(refused)}")
    assert statistics.median(refused) <= 10


def percentiles(values_ms: Sequence[float]) -> str:
    ordered = sorted(values_ms)
    return f"p50 {ordered[len(ordered) // 2]:.1f} ms, p99 {ordered[int(len(ordered) * 0.99)]:.1f} ms"
