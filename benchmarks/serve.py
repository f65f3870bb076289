"""`serve`: compare how many callers share one model, over HTTP or in one process."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import report
from benchmarks.common import quiet
from benchmarks.models import Setup, chosen_model
from benchmarks.peers.contender import NotAvailableError
from benchmarks.serving import in_process, over_http
from benchmarks.serving.loads import (
    NUM_PASSAGES,
    NUM_SHORT_CALLERS,
    RATES,
    Cell,
    Contender,
    Request,
    Requests,
    measure,
)

MAX_DIFFERENCE: Final = 1e-4


class Entry(NamedTuple):
    """How to load a contender.

    Attributes:
        load: Loads it for a model. The stack ends it.
        baseline: Key of the contender that it is compared with in the tables.
        install: Packages to install if it is missing.
    """

    load: Callable[[Setup, ExitStack], Contender]
    baseline: str
    install: str = ""


_LOCK: Final = "in-process-lock"
_APP: Final = "http-app"
_OURS: Final = ("http-ours", "in-process-scorer", "in-process-scorer-async")


def entries(infinity: Path | None = None) -> dict[str, Entry]:
    """Return the contenders.

    Args:
        infinity: The interpreter of the environment that `infinity_emb` is installed in.
    """
    load_infinity = partial(over_http.load_infinity, python=infinity)
    return {
        "http-ours": Entry(over_http.load_ours, _APP),
        "http-app": Entry(over_http.load_app, _APP, "sentence-transformers"),
        "http-infinity": Entry(load_infinity, _APP),
        "in-process-scorer": Entry(in_process.load_scorer, _LOCK),
        "in-process-scorer-async": Entry(in_process.load_scorer_async, _LOCK),
        "in-process-lock": Entry(in_process.load_lock, _LOCK, "sentence-transformers"),
        "in-process-llama-index": Entry(
            in_process.load_llama_index, _LOCK, "llama-index-core sentence-transformers"
        ),
    }


CONTENDERS: Final = tuple(entries())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.set_defaults(shape="small", repeats=3)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="seconds per contender and load, over all repeats"
    )
    parser.add_argument(
        "--callers", type=int, nargs="+", default=[1, 16, 64], help="numbers of callers in the closed loop"
    )
    parser.add_argument(
        "--infinity", type=Path, metavar="PYTHON", help="interpreter with infinity_emb, for http-infinity"
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if args.seconds <= 0 or min(args.callers) < 1:
        parser.error("--seconds and --callers must be positive")


def run(args: argparse.Namespace) -> int:
    """Run the command. The exit status is 1 if contenders disagree or a request to this package fails."""
    chosen = {key: entry for key, entry in entries(args.infinity).items() if key in args.contenders}
    with ExitStack() as stack:
        with quiet():
            setup = stack.enter_context(chosen_model(args))
        document = report.begin(args, "seconds", "repeats", "callers")
        document["settings"]["passages"] = list(NUM_PASSAGES)
        with quiet():
            contenders, missing = _load(chosen, setup, stack)
        requests = Requests(setup.tokenizer_path)
        with quiet():
            differences = _largest_differences(contenders, requests.mixed())
        cells = _run_loads(contenders, chosen, requests, args)
        with quiet():
            document |= _costs(contenders, setup, requests)
    names = {key: contender.name for key, contender in contenders.items()}
    document |= {
        "contenders": names,
        "results": [{"key": key, **cell.summary()} for key, cell in cells],
        "max_difference": differences,
    }
    problems = _find_problems(cells, differences)
    for line in _conclusions(cells, document):
        print(line)
    return report.end(document, missing=missing, problems=problems)


def _load(
    chosen: dict[str, Entry], setup: Setup, stack: ExitStack
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Load the contenders that are available. Return them, and the reasons why others are not available."""
    contenders: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for key, entry in chosen.items():
        loaded = _load_one(entry, setup, stack)
        if isinstance(loaded, str):
            missing[key] = loaded
        else:
            contenders[key] = loaded
    return contenders, missing


def _load_one(entry: Entry, setup: Setup, stack: ExitStack) -> Contender | str:
    """Return a contender, or the reason why it is not available."""
    try:
        return entry.load(setup, stack)
    except NotAvailableError as error:
        return str(error)
    except ImportError as error:
        return f"pip install {entry.install}  ({error})"


def _largest_differences(contenders: dict[str, Contender], request: Request) -> dict[str, float]:
    """Send the same request to each contender. Return the largest difference from the first's scores.

    This also warms up each contender.
    """
    answers = {key: contender.answer(request) for key, contender in contenders.items()}
    first = next(iter(answers.values()), [])
    return {
        key: max(abs(a - b) for a, b in zip(first, scores, strict=True)) for key, scores in answers.items()
    }


def _run_loads(
    contenders: dict[str, Contender],
    chosen: dict[str, Entry],
    requests: Requests,
    args: argparse.Namespace,
) -> list[tuple[str, Cell]]:
    """Run every load, and print a table for each. Return the key and the results of each contender."""
    keys, loaded = list(contenders), list(contenders.values())
    results: list[tuple[str, Cell]] = []

    def run_load(mode: str, load: float, keys: Sequence[str]) -> None:
        with quiet():
            cells = measure(
                mode,
                load,
                [contenders[key] for key in keys],
                requests,
                seconds=args.seconds,
                rounds=args.repeats,
            )
        found = dict(zip(keys, cells, strict=True))
        _print_load(found, {key: found.get(chosen[key].baseline) for key in keys})
        results.extend(found.items())

    for count in args.callers if loaded else ():
        run_load("closed", count, keys)
    for rate in _rates(results, chosen):
        run_load("open", rate, keys)
    threaded = [key for key in keys if not contenders[key].is_async]
    if threaded:
        run_load("mixed", NUM_SHORT_CALLERS, threaded)
    return results


def _rates(results: Sequence[tuple[str, Cell]], chosen: dict[str, Entry]) -> list[float]:
    """Return the rates of the open loop: shares of what the baseline served in the closed loops."""
    baselines = {entry.baseline for entry in chosen.values()} & {key for key, _ in results}
    served = [cell.requests_per_s for key, cell in results if not baselines or key in baselines]
    return [share * max(served) for share in RATES] if served else []


def _costs(contenders: dict[str, Contender], setup: Setup, requests: Requests) -> dict[str, Any]:
    """Return what the queue and HTTP add to a small request of a lone caller."""
    costs: dict[str, Any] = {}
    if "http-ours" in contenders:
        costs["http"] = over_http.http_cost(setup, contenders["http-ours"], requests.short)
    if "in-process-scorer" in contenders:
        costs["lone_caller"] = in_process.queue_overhead(setup)
    return costs


def _find_problems(cells: Sequence[tuple[str, Cell]], differences: dict[str, float]) -> list[str]:
    problems = [
        f"{key} differs by {difference:.2e}, more than {MAX_DIFFERENCE:.0e}"
        for key, difference in differences.items()
        if not difference <= MAX_DIFFERENCE
    ]
    return problems + [
        f"{key}, {cell.mode} {cell.load:g}: {dict(cell.errors)}"
        for key, cell in cells
        if cell.errors and key in _OURS
    ]


def _print_load(cells: dict[str, Cell], baselines: dict[str, Cell | None]) -> None:
    first = next(iter(cells.values()))
    unit = {"closed": "callers", "open": "requests a second", "mixed": "short callers beside a long one"}
    rows = []
    for key, cell in cells.items():
        baseline = baselines[key]
        ratios = ["", ""]
        if baseline is not None and baseline.latencies_s:
            ratios = [
                f"{cell.requests_per_s / baseline.requests_per_s:.2f}",
                f"{cell.percentile_s(0.99) / baseline.percentile_s(0.99):.2f}",
            ]
        figures = [
            f"{len(cell.latencies_s)}",
            f"{cell.requests_per_s:.2f}",
            f"{1000 * cell.percentile_s(0.5):.0f}",
            f"{1000 * cell.percentile_s(0.99):.0f}",
            f"{sum(cell.errors.values())}",
        ]
        rows.append((cell.contender, [*figures, *ratios]))
    columns = ["requests", "per s", "p50 ms", "p99 ms", "errors", "x per s", "x p99"]
    report.print_table(f"{first.mode}, {first.load:.3g} {unit[first.mode]}", columns, rows)


def _conclusions(results: Sequence[tuple[str, Cell]], document: dict[str, Any]) -> list[str]:
    """Return the figures that matter most, each with what is expected."""
    found = {(cell.mode, cell.load, key): cell for key, cell in results}
    lines = []
    for ours, theirs, times in (
        ("http-ours", "http-app", 3.0),
        ("http-ours", "http-infinity", 2.0),
        ("in-process-scorer", "in-process-lock", 1.5),
    ):
        pair = [found.get(("closed", 16, key)) for key in (ours, theirs)]
        if pair[0] and pair[1]:
            ratio = pair[0].requests_per_s / pair[1].requests_per_s
            lines.append(
                f"16 callers: {ratio:.2f} times the requests a second of {theirs}; expected {times:g} or more"
            )
        pair = [found.get(("mixed", NUM_SHORT_CALLERS, key)) for key in (ours, theirs)]
        if pair[0] and pair[1]:
            ratio = pair[0].percentile_s(0.99) / pair[1].percentile_s(0.99)
            lines.append(
                f"short requests beside a long one: {ratio:.3f} times the p99 of {theirs}; expected 0.333 or "
                "less"
            )
    if http := document.get("http"):
        lines.append(
            f"one caller, 5 passages: {http['http_ms']:.1f} ms over HTTP, {http['rank_ms']:.1f} ms through "
            f"Scorer.rank, so HTTP adds {http['added_ms']:.1f} ms; expected 3 or less"
        )
    if lone := document.get("lone_caller"):
        lines.append(
            f"one caller, one pair: {lone['scorer_us']:.0f} us through the queue, {lone['direct_us']:.0f} us "
            f"without it, so the queue takes {lone['overhead_us']:.0f} us; expected less than 1000"
        )
    return lines
