"""A Serve application whose replicas are killed and updated: is any request lost or answered wrongly?"""

from __future__ import annotations

import math
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve

from benchmarks.common import PairMaker
from benchmarks.models import Setup
from benchmarks.ray_common import TOLERANCE, local_cluster
from bge_rerank_integrations import RemoteScorer, Scorer
from bge_rerank_integrations.errors import RerankError
from bge_rerank_integrations.protocols import PackageScorer
from bge_rerank_integrations.ray import ServeArguments, ServeScorer, app
from examples.random_checkpoint import build_random_checkpoint

_NUM_REPLICAS: Final = 2
_NUM_KILLS: Final = 5
_NUM_PASSAGES: Final = 10
_NUM_DIFFERENT: Final = 50
_MAX_RETRIES: Final = 10
_TIMEOUT_S: Final = 120.0

Request = tuple[str, list[str]]
Scores = list[dict[int, float]]
"""For each request, the score of each passage."""


def measure_serve(
    setup: Setup, num_requests: int, num_clients: int, seed: int, problems: list[str]
) -> dict[str, Any]:
    """Send requests while replicas are killed, and again while the model is replaced.

    Half of the clients use a handle, and half use HTTP.

    Args:
        setup: The model.
        num_requests: Number of requests while replicas are killed.
        num_clients: Number of clients.
        seed: Seed of the requests and of the choice of replicas.
        problems: Receives what is wrong.

    Returns:
        The figures to print.
    """
    maker = PairMaker(setup.tokenizer_path)
    requests = []
    for number in range(_NUM_DIFFERENT):
        pairs = maker.pairs(_NUM_PASSAGES, seed + number, length=32)
        requests.append((pairs[0][0], [passage for _, passage in pairs]))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        other = build_random_checkpoint(Path(folder) / "other")
        old, new = (
            _expected(setup.model, setup.device, requests),
            _expected(str(other), setup.device, requests),
        )
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        with local_cluster():
            serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
            clients = _deploy(setup.model, setup.device, port)
            load = _Load(clients, requests, num_clients)
            with _Background(lambda: _kill_replicas(load, num_requests, random.Random(seed))) as killer:
                load.send(num_requests, [old])
            during_kills = load.take()
            with _Background(lambda: _deploy(str(other), setup.device, port)) as update:
                while update.is_running:
                    load.send(num_clients, [old, new])
            during_update = load.take()
            load.send(num_clients, [new])
            after_update = load.take()
            serve.shutdown()
    for name, counts in (("killed", during_kills), ("updated", during_update)):
        problems += [
            f"serve: {counts[outcome]} {outcome} answers while replicas were {name}"
            for outcome in ("wrong", "untyped")
            if counts[outcome]
        ]
    if after_update["right"] != num_clients:
        problems.append("serve: the new model does not answer after the update")
    if during_update["typed error"]:
        problems.append(f"serve: the update lost {during_update['typed error']} requests")
    if killer.result != _NUM_KILLS:
        problems.append(f"serve: only {killer.result} replicas were killed in time")
    return {
        "requests": num_requests,
        "replicas killed": killer.result,
        **{f"kills: {outcome}": during_kills[outcome] for outcome in ("right", "typed error", "wrong")},
        "kills: p50 ms": round(during_kills["p50 ms"]),
        "kills: p99 ms": round(during_kills["p99 ms"]),
        **{f"update: {outcome}": during_update[outcome] for outcome in ("right", "typed error", "wrong")},
    }


class _Background:
    """Runs a function in a thread beside the block, and has its result after the block."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self._function = function
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether the function has not returned yet."""
        return self._thread.is_alive()

    def _run(self) -> None:
        self.result = self._function()


class _Load:
    """Sends requests from several clients at the same time, and counts how they end."""

    def __init__(
        self, clients: Sequence[PackageScorer], requests: Sequence[Request], num_clients: int
    ) -> None:
        self._clients = clients
        self._requests = requests
        self._num_clients = num_clients
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._seconds: list[float] = []

    @property
    def num_done(self) -> int:
        """Number of requests that have ended since the last `take`."""
        return len(self._seconds)

    def send(self, num_requests: int, expected: Sequence[Scores]) -> None:
        """Send requests and wait for all of them. Each answer must equal one of the expected ones."""
        with ThreadPoolExecutor(self._num_clients) as pool:
            list(pool.map(lambda number: self._send(number, expected), range(num_requests)))

    def take(self) -> dict[str, Any]:
        """Return the counts of the outcomes and the percentiles, and start again."""
        counts: dict[str, Any] = dict.fromkeys(("right", "typed error", "wrong", "untyped"), 0)
        counts |= self._outcomes
        seconds = sorted(self._seconds)
        for share in (50, 99):
            counts[f"p{share} ms"] = 1000 * seconds[math.ceil(len(seconds) * share / 100) - 1]
        self._outcomes, self._seconds = Counter(), []
        return counts

    def _send(self, number: int, expected: Sequence[Scores]) -> None:
        at = number % len(self._requests)
        started = time.perf_counter()
        try:
            ranking = self._clients[number % len(self._clients)].rank(*self._requests[at])
            scores = {passage.index: passage.score for passage in ranking}
            is_right = any(_agree(scores, each[at]) for each in expected)
            outcome = "right" if is_right else "wrong"
        except RerankError:
            outcome = "typed error"
        except Exception as error:
            print(f"untyped error: {type(error).__name__}", flush=True)
            outcome = "untyped"
        with self._lock:
            self._outcomes[outcome] += 1
            self._seconds.append(time.perf_counter() - started)


def _agree(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and all(
        abs(score - expected[index]) <= TOLERANCE for index, score in found.items()
    )


def _expected(model: str, device: str, requests: Sequence[Request]) -> Scores:
    with Scorer(model, device=device, dtype="float32", num_threads=1) as scorer:
        return [{each.index: each.score for each in scorer.rank(*request)} for request in requests]


def _deploy(model: str, device: str, port: int) -> list[PackageScorer]:
    arguments = ServeArguments(
        model=model, device=device, dtype="float32", num_replicas=_NUM_REPLICAS, num_cpus=0.5, num_threads=1
    )
    handle = serve.run(app(arguments), name="rerank")
    return [
        ServeScorer(handle, timeout=_TIMEOUT_S, max_retries=_MAX_RETRIES),
        RemoteScorer(f"http://127.0.0.1:{port}", timeout=_TIMEOUT_S, max_retries=_MAX_RETRIES),
    ]


def _kill_replicas(load: _Load, num_requests: int, rng: random.Random) -> int:
    """Kill a replica each time that a sixth of the requests has ended. Return how many were killed."""
    num_killed = 0
    for kill in range(_NUM_KILLS):
        goal = (kill + 1) * num_requests // (_NUM_KILLS + 1)
        while load.num_done < goal:
            time.sleep(0.05)
        replicas = [each for each in ray.util.list_named_actors(all_namespaces=True) if "#" in each["name"]]
        if replicas:
            replica = rng.choice(replicas)
            ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))
            num_killed += 1
    return num_killed
