"""Serve many callers with one model: compare requests per second and latency with common alternatives.

    python -m benchmarks.serving [--model FOLDER_OR_ID] [--device cpu|cuda] [--seconds 10]

`benchmarks/README.md` explains what is compared and how to read the output.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.common import PairMaker, describe_hardware, import_optional, quiet, version
from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.locate import find_checkpoint
from bge_rerank_integrations.text.pairs import PreparedPairs
from examples.random_checkpoint import build_random_checkpoint

OURS: Final = "Scorer.rank, threads"
OURS_ASYNC: Final = "Scorer.arank, asyncio"
LOCKED: Final = "CrossEncoder behind a lock, threads"
LLAMA_INDEX: Final = "SentenceTransformerRerank, to_thread"
PEERS: Final = {
    LOCKED: ("sentence_transformers", "pip install sentence-transformers"),
    LLAMA_INDEX: ("llama_index.core.postprocessor", "pip install llama-index-core sentence-transformers"),
}
DISTRIBUTIONS: Final = ("torch", "transformers", "tokenizers", "sentence-transformers", "llama-index-core")

# Small enough for a CPU to serve, and large enough that the model takes most of the time.
SHAPE: Final = {"num_layers": 6, "hidden_size": 384, "num_heads": 12, "intermediate_size": 1536}
NUM_REQUESTS: Final = 32
NUM_PASSAGES: Final = (20, 100)
NUM_LONG, NUM_SHORT, NUM_SHORT_CALLERS = 400, 5, 4
NUM_ROUNDS: Final = 3
# Rates of the open loop, as shares of the rate that the locked CrossEncoder can serve.
RATES: Final = (0.5, 0.8, 1.2, 1.6)
NUM_LONE: Final = 200
MAX_DIFFERENCE: Final = 1e-4

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
    is_async: bool


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


# Contenders.


def _load_contenders(scorer: Scorer, model: str, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Load the contenders that are installed. Return install commands for the others."""
    contenders = [_load_ours(scorer), _load_ours_async(scorer)]
    missing: dict[str, str] = {}
    for (name, (module, command)), load in zip(PEERS.items(), (_load_locked, _load_llama_index), strict=True):
        package, reason = import_optional(module)
        try:
            contenders.append(load(package, model, device))
        except (AttributeError, ImportError) as error:
            missing[name] = f"{command}  ({reason or error})"
    return contenders, missing


def _load_ours(scorer: Scorer) -> Contender:
    return Contender(OURS, lambda request: _in_order(scorer.rank(*request)), is_async=False)


def _load_ours_async(scorer: Scorer) -> Contender:
    async def ask(request: Request) -> list[float]:
        return _in_order(await scorer.arank(*request))

    return Contender(OURS_ASYNC, ask, is_async=True)


def _in_order(ranking: Sequence[Any]) -> list[float]:
    return [passage.score for passage in sorted(ranking, key=lambda passage: passage.index)]


def _load_locked(package: Any, model: str, device: str) -> Contender:
    encoder = package.CrossEncoder(model, device=device)
    lock = threading.Lock()

    def ask(request: Request) -> list[float]:
        query, passages = request
        with lock:
            return list(map(float, encoder.predict([(query, passage) for passage in passages])))

    return Contender(LOCKED, ask, is_async=False)


def _load_llama_index(package: Any, model: str, device: str) -> Contender:
    from llama_index.core.schema import NodeWithScore, TextNode

    reranker = package.SentenceTransformerRerank(
        model=model, top_n=NUM_LONG, device=device, trust_remote_code=False
    )

    def rerank(request: Request) -> list[float]:
        query, passages = request
        nodes = [NodeWithScore(node=TextNode(text=passage)) for passage in passages]
        reranker.postprocess_nodes(list(nodes), query_str=query)
        return [float(node.score or 0.0) for node in nodes]  # it sets the scores of the nodes it was given

    async def ask(request: Request) -> list[float]:
        return await asyncio.to_thread(rerank, request)

    return Contender(LLAMA_INDEX, ask, is_async=True)


def _answer(contender: Contender, request: Request) -> list[float]:
    if not contender.is_async:
        return list(contender.ask(request))

    async def wait() -> list[float]:
        return list(await contender.ask(request))

    return asyncio.run(wait())


def _largest_differences(contenders: Sequence[Contender], request: Request) -> dict[str, float]:
    """Send the same request to each contender. Return the largest difference from the first's scores.

    This also warms up each contender.
    """
    answers = {contender.name: _answer(contender, request) for contender in contenders}
    first = answers[contenders[0].name]
    return {
        name: max(abs(a - b) for a, b in zip(first, scores, strict=True)) for name, scores in answers.items()
    }


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


Load = Callable[[Cell, Contender, Requests, float], None]


def _measure(
    run: Load, mode: str, load: float, contenders: Sequence[Contender], requests: Requests, seconds: float
) -> list[Cell]:
    """Run the contenders in turn for several rounds. Each round starts with a different contender."""
    cells = [Cell(mode, load, contender.name) for contender in contenders]
    turns = list(zip(cells, contenders, strict=True))
    for number in range(NUM_ROUNDS):
        first = number % len(turns)
        for cell, contender in (*turns[first:], *turns[:first]):
            # In the open loop all contenders get the same requests, no matter how long they take.
            if mode == "open" or cell.wall_s < 0.9 * seconds:
                run(cell, contender, requests, seconds / NUM_ROUNDS)
                cell.num_rounds += 1
    for cell in cells:
        _print_cell(cell, next((each for each in cells if each.contender == LOCKED), None))
    return cells


def _lone_overhead(scorer: Scorer) -> dict[str, float]:
    """Time one short pair through the scorer and directly through its parts, in turn. Return microseconds."""
    pipeline = scorer._require_pipeline()
    query, passage = "what is a panda?", "The giant panda is a bear."

    def direct() -> float:
        prepared = PreparedPairs([(query, [passage])])
        (windows,) = prepared.encode(pipeline.tokenizer, repeat(1))
        pending = pipeline.runners[0].launch(windows)
        assert pending is not None
        return prepared.scores(pending.wait(), normalize=True)[0]

    ways: dict[str, Callable[[], object]] = {
        "scorer_us": lambda: scorer.score([(query, passage)]),
        "direct_us": direct,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(NUM_LONE + 20):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            ways[name]()
            times[name].append(1e6 * (time.perf_counter() - began))
    medians = {name: statistics.median(each[20:]) for name, each in times.items()}
    return {**medians, "overhead_us": medians["scorer_us"] - medians["direct_us"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run all loads. Return 1 if contenders disagree or a request to this package fails, else 0."""
    args = _parse(argv)
    with ExitStack() as stack:
        with quiet():
            model = args.model or _build(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            scorer = Scorer(model, device=args.device, dtype="float32", normalize=True)
            stack.enter_context(scorer)
            requests = Requests(find_checkpoint(ScorerConfig(model=model)) / "tokenizer.json")
            contenders, missing = _load_contenders(scorer, model, args.device)
            differences = _largest_differences(contenders, requests.mixed())
        report: dict[str, Any] = {
            "hardware": describe_hardware(args.device),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in DISTRIBUTIONS},
            },
            "workload": {
                "model": args.model or f"random weights, {SHAPE}",
                "device": args.device,
                "dtype": "float32",
                "seconds": args.seconds,
                "passages": list(NUM_PASSAGES),
            },
        }
        _print_header(report)
        with quiet():
            lone = _lone_overhead(scorer)
            cells = _run_loads(contenders, requests, args.callers, args.seconds)
    problems = _find_problems(cells, differences)
    report |= {
        "results": [_summarize(cell) for cell in cells],
        "lone_caller": lone,
        "max_difference": differences,
        "missing": missing,
        "problems": problems,
    }
    _print_summary(cells, lone, missing, problems)
    print(json.dumps(report))
    return 1 if problems else 0


def _run_loads(
    contenders: Sequence[Contender], requests: Requests, callers: Sequence[int], seconds: float
) -> list[Cell]:
    cells: list[Cell] = []
    for count in callers:
        cells += _measure(_closed, "closed", count, contenders, requests, seconds)
    baseline = next((contender.name for contender in contenders if contender.name == LOCKED), OURS)
    capacity = max(cell.requests_per_s for cell in cells if cell.contender == baseline)
    for share in RATES:
        cells += _measure(_open, "open", share * capacity, contenders, requests, seconds)
    threaded = [contender for contender in contenders if not contender.is_async]
    return cells + _measure(_mixed, "mixed", NUM_SHORT_CALLERS, threaded, requests, seconds)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", help="use this model instead of random weights: a checkpoint folder or hub id"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per contender and load")
    parser.add_argument(
        "--callers", type=int, nargs="+", default=[1, 4, 16, 64], help="callers in the closed loop"
    )
    args = parser.parse_args(argv)
    if args.seconds <= 0 or min(args.callers) < 1:
        parser.error("--seconds and --callers must be positive")
    return args


def _build(folder: Path) -> str:
    return str(build_random_checkpoint(folder, **SHAPE))


def _find_problems(cells: Sequence[Cell], differences: dict[str, float]) -> list[str]:
    problems = [
        f"{name} differs by {difference:.2e}, more than {MAX_DIFFERENCE:.0e}"
        for name, difference in differences.items()
        if not difference <= MAX_DIFFERENCE
    ]
    return problems + [
        f"{cell.contender}, {cell.mode} {cell.load:g}: {dict(cell.errors)}"
        for cell in cells
        if cell.errors and cell.contender in (OURS, OURS_ASYNC)
    ]


def _summarize(cell: Cell) -> dict[str, Any]:
    return {
        "mode": cell.mode,
        "load": cell.load,
        "contender": cell.contender,
        "num_requests": len(cell.latencies_s),
        "num_rounds": cell.num_rounds,
        "wall_s": cell.wall_s,
        "errors": dict(cell.errors),
        "requests_per_s": cell.requests_per_s,
        "p50_s": cell.percentile_s(0.5),
        "p99_s": cell.percentile_s(0.99),
    }


def _print_header(report: dict[str, Any]) -> None:
    for title in ("hardware", "versions", "workload"):
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in report[title].items()))
    columns = ("requests", "per s", "p50 ms", "p99 ms", "errors", "per s / lock", "p99 / lock")
    print(f"\n{'load':26}{'contender':40}" + "".join(f"{column:>13}" for column in columns), flush=True)


def _print_cell(cell: Cell, locked: Cell | None) -> None:
    unit = {"closed": "callers", "open": "per s", "mixed": "short callers"}[cell.mode]
    figures = [
        f"{len(cell.latencies_s)}",
        f"{cell.requests_per_s:.2f}",
        f"{1000 * cell.percentile_s(0.5):.0f}",
        f"{1000 * cell.percentile_s(0.99):.0f}",
        f"{sum(cell.errors.values())}",
    ]
    if locked is not None:
        figures.append(f"{cell.requests_per_s / locked.requests_per_s:.2f}")
        figures.append(f"{cell.percentile_s(0.99) / locked.percentile_s(0.99):.2f}")
    load = f"{cell.mode}, {cell.load:.3g} {unit}"
    print(f"{load:26}{cell.contender:40}" + "".join(f"{figure:>13}" for figure in figures), flush=True)


def _print_summary(
    cells: Sequence[Cell], lone: dict[str, float], missing: dict[str, str], problems: Sequence[str]
) -> None:
    found = {(cell.mode, cell.load, cell.contender): cell for cell in cells}
    print()
    ours, lock = found.get(("closed", 16, OURS)), found.get(("closed", 16, LOCKED))
    if ours and lock:
        ratio = ours.requests_per_s / lock.requests_per_s
        print(f"16 callers: {ratio:.2f} times the requests per second of the lock; expected 1.5 or more")
    ours, lock = (found.get(("mixed", NUM_SHORT_CALLERS, name)) for name in (OURS, LOCKED))
    if ours and lock:
        ratio = ours.percentile_s(0.99) / lock.percentile_s(0.99)
        print(f"short with long requests: {ratio:.3f} times the p99 of the lock; expected 0.333 or less")
    print(
        f"one caller, one pair: {lone['scorer_us']:.0f} us, {lone['direct_us']:.0f} us without the queue, "
        f"so the queue takes {lone['overhead_us']:.0f} us; expected less than 1000"
    )
    for cell in cells:
        for error, count in cell.errors.items():
            print(f"{cell.contender}, {cell.mode} {cell.load:.3g}: {count} times {error}")
    for peer, command in missing.items():
        print(f"not compared: {peer}; {command}")
    for problem in problems:
        print(f"PROBLEM: {problem}")


if __name__ == "__main__":
    sys.exit(main())
