"""Loads of many callers, and what they measure."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.common import PairMaker

NUM_REQUESTS: Final = 32
NUM_PASSAGES: Final = (20, 100)
NUM_LONG, NUM_SHORT, NUM_SHORT_CALLERS = 400, 5, 4
# Rates of the open loop, as shares of the rate that the baseline can serve.
RATES: Final = (0.5, 0.8, 1.2, 1.6)

Request = tuple[str, list[str]]


@dataclass(frozen=True)
class Contender:
    """One way to serve requests.

    Attributes:
        name: Name in the table.
        ask: Takes a request, and returns its scores in the order of its passages, or an awaitable of them.
        is_async: Whether callers are tasks of one event loop instead of threads.
    """

    name: str
    ask: Callable[[Request], Any]
    is_async: bool = False

    def answer(self, request: Request) -> list[float]:
        """Send one request, and return its scores."""
        if not self.is_async:
            return list(self.ask(request))

        async def wait() -> list[float]:
            return list(await self.ask(request))

        return asyncio.run(wait())


@dataclass
class Cell:
    """The results of one contender under one load.

    Attributes:
        mode: `closed`, `open` or `mixed`.
        load: Number of callers, or in `open` mode the requests offered per second.
        contender: Name of the contender.
        latencies_s: Seconds until the answer, for each answered request. In `mixed` mode, only for the short
            requests.
        num_rounds: Number of rounds that were run.
        wall_s: Seconds over all rounds, until the last answer.
        errors: Number of failed requests for each type of error.
    """

    mode: str
    load: float
    contender: str
    latencies_s: list[float] = field(default_factory=list)
    num_rounds: int = 0
    wall_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def requests_per_s(self) -> float:
        """Answered requests per second."""
        return len(self.latencies_s) / self.wall_s if self.wall_s else math.nan

    def percentile_s(self, share: float) -> float:
        """Return a percentile of the latencies, in seconds. `share` is from 0 to 1."""
        ordered = sorted(self.latencies_s)
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan

    def summary(self) -> dict[str, Any]:
        """Return the results for the report."""
        return {
            "mode": self.mode,
            "load": self.load,
            "contender": self.contender,
            "num_requests": len(self.latencies_s),
            "num_rounds": self.num_rounds,
            "wall_s": self.wall_s,
            "errors": dict(self.errors),
            "requests_per_s": self.requests_per_s,
            "p50_s": self.percentile_s(0.5),
            "p99_s": self.percentile_s(0.99),
        }

    def note(self, began: float, ask: Callable[[], object]) -> None:
        """Wait for an answer, and record its latency since `began`."""
        try:
            ask()
        except Exception as error:
            self.errors[type(error).__name__] += 1
        else:
            self.latencies_s.append(time.perf_counter() - began)

    async def anote(self, began: float, answer: Awaitable[object]) -> None:
        """Await an answer, and record its latency since `began`."""
        try:
            await answer
        except Exception as error:
            self.errors[type(error).__name__] += 1
        else:
            self.latencies_s.append(time.perf_counter() - began)


class Requests:
    """An endless source of requests. No two requests share a passage, so that no cache helps.

    Args:
        tokenizer_path: The model's `tokenizer.json`, for generating passages of known lengths.
    """

    def __init__(self, tokenizer_path: Path) -> None:
        rng = random.Random(0)
        maker = PairMaker(tokenizer_path)
        self._serial = itertools.count()
        self._kept = [_request(maker, rng.randint(*NUM_PASSAGES), n) for n in range(NUM_REQUESTS)]
        self._long = _request(maker, NUM_LONG, NUM_REQUESTS)
        self._short = _request(maker, NUM_SHORT, NUM_REQUESTS + 1)

    def mixed(self) -> Request:
        """Return a request of 20 to 100 passages."""
        serial = next(self._serial)
        return _marked(self._kept[serial % NUM_REQUESTS], serial)

    def long(self) -> Request:
        """Return a request of many passages."""
        return _marked(self._long, next(self._serial))

    def short(self) -> Request:
        """Return a request of few passages."""
        return _marked(self._short, next(self._serial))


def _request(maker: PairMaker, num_passages: int, seed: int) -> Request:
    pairs = maker.pairs(num_passages, seed)
    return pairs[0][0], [passage for _, passage in pairs]


def _marked(request: Request, serial: int) -> Request:
    query, passages = request
    return query, [f"{serial} {passage}" for passage in passages]


# Loads. Each function adds one round to a cell. Requests that start before the round's end are completed.


def _closed(cell: Cell, contender: Contender, requests: Requests, seconds: float) -> None:
    """Run a closed loop: each caller sends its next request as soon as it has an answer."""
    began = time.perf_counter()
    _callers(cell, contender, [requests.mixed] * int(cell.load), began + seconds)
    cell.wall_s += time.perf_counter() - began


def _callers(
    cell: Cell, contender: Contender, sources: Sequence[Callable[[], Request]], deadline: float
) -> None:
    """Run one caller per source of requests until the deadline."""

    def call(source: Callable[[], Request]) -> None:
        while time.perf_counter() < deadline:
            request = source()
            cell.note(time.perf_counter(), partial(contender.ask, request))

    async def acall(source: Callable[[], Request]) -> None:
        while time.perf_counter() < deadline:
            request = source()
            await cell.anote(time.perf_counter(), contender.ask(request))

    async def run() -> None:
        await asyncio.gather(*map(acall, sources))

    if contender.is_async:
        asyncio.run(run())
    else:
        with ThreadPoolExecutor(len(sources)) as pool:
            list(pool.map(call, sources))


def _open(cell: Cell, contender: Contender, requests: Requests, seconds: float) -> None:
    """Run an open loop: requests arrive at random times, even if earlier requests are still waiting."""
    rng = random.Random(cell.num_rounds)
    count = max(round(seconds * cell.load), 1)
    times = sorted(rng.uniform(0.0, seconds) for _ in range(count))
    arrivals = [(at, requests.mixed()) for at in times]
    began = time.perf_counter()

    def run() -> None:
        with ThreadPoolExecutor(len(arrivals)) as pool:
            for at, request in arrivals:
                time.sleep(max(began + at - time.perf_counter(), 0.0))
                pool.submit(cell.note, began + at, partial(contender.ask, request))

    async def arun() -> None:
        tasks = []
        for at, request in arrivals:
            await asyncio.sleep(max(began + at - time.perf_counter(), 0.0))
            tasks.append(asyncio.create_task(cell.anote(began + at, contender.ask(request))))
        await asyncio.gather(*tasks)

    asyncio.run(arun()) if contender.is_async else run()
    cell.wall_s += time.perf_counter() - began


def _mixed(cell: Cell, contender: Contender, requests: Requests, seconds: float) -> None:
    """Run one caller with long requests together with callers with short requests."""
    began = time.perf_counter()
    aside = Cell(cell.mode, cell.load, cell.contender)
    long = threading.Thread(target=_callers, args=(aside, contender, [requests.long], began + seconds))
    long.start()
    time.sleep(0.05)  # the long request must be running before the short ones start
    _callers(cell, contender, [requests.short] * int(cell.load), began + seconds)
    cell.wall_s += time.perf_counter() - began
    long.join()
    cell.errors += aside.errors


def measure(
    mode: str,
    load: float,
    contenders: Sequence[Contender],
    requests: Requests,
    *,
    seconds: float,
    rounds: int,
) -> list[Cell]:
    """Run the contenders in turn for several rounds. Each round starts with a different contender.

    Args:
        mode: A key of `LOADS`.
        load: Number of callers, or in `open` mode the requests offered per second.
        contenders: The contenders.
        requests: Source of requests.
        seconds: Seconds for each contender over all rounds. What has begun is waited for.
        rounds: Number of rounds.
    """
    cells = [Cell(mode, load, contender.name) for contender in contenders]
    turns = list(zip(cells, contenders, strict=True))
    for number in range(rounds):
        first = number % len(turns)
        for cell, contender in (*turns[first:], *turns[:first]):
            # In the open loop all contenders get the same requests, no matter how long they take.
            if mode == "open" or cell.wall_s < 0.9 * seconds:
                LOADS[mode](cell, contender, requests, seconds / rounds)
                cell.num_rounds += 1
    return cells


LOADS: Final[dict[str, Callable[[Cell, Contender, Requests, float], None]]] = {
    "closed": _closed,
    "open": _open,
    "mixed": _mixed,
}
