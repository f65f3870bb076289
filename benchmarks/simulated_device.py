"""`device`: measure for which share of the time the queue keeps a simulated GPU busy.

The simulated GPU computes every batch in the same time, whatever its size. So the figures show the queue
alone, and small batches cost as much as large ones, which is the worst case for a GPU.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks import report
from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.workers import Replica
from bge_rerank_integrations.text.tokenization import IntArray

_MAX_BATCH_TOKENS: Final = 16_384
_LENGTH: Final = 128
_DEPTHS: Final = (1, 2)
# Name, number of callers, and number of sequences in each of their requests.
_LOADS: Final = (
    ("one long request", 1, None),
    ("64 callers, 100 pairs", 64, 100),
    ("16 callers, 3 pairs", 16, 3),
)


class SimulatedDevice:
    """Scores a sequence with its first id, and takes a fixed time for each batch.

    Args:
        compute_s: Time in seconds that the device computes a batch.
        host_s: Time in seconds for which a launch keeps a core busy, as packing and launching kernels does.
        depth: Number of batches that the device holds at once.

    Attributes:
        num_batches: Number of launched batches.
    """

    def __init__(self, *, compute_s: float, host_s: float, depth: int) -> None:
        self.num_batches = 0
        self._compute_s = compute_s
        self._host_s = host_s
        self._depth = depth
        self._began_at = 0.0  # when the first batch began
        self._free_at = 0.0  # when the last batch is done

    @property
    def busy_share(self) -> float:
        """Share of the time from the start of the first batch to the end of the last, from 0 to 1."""
        return self.num_batches * self._compute_s / (self._free_at - self._began_at)

    def replica(self) -> Replica:
        """Return a replica for the queue."""
        return Replica(self._launch, lambda: _MAX_BATCH_TOKENS, self._depth)

    def _launch(self, sequences: list[IntArray], *, is_alone: bool) -> _Batch:  # noqa: ARG002
        ready_at = time.perf_counter() + self._host_s
        while time.perf_counter() < ready_at:
            pass
        begins_at = max(self._free_at, time.perf_counter())
        self._began_at = self._began_at or begins_at
        self._free_at = begins_at + self._compute_s
        self.num_batches += 1
        return _Batch([float(sequence[0]) for sequence in sequences], self._free_at)


class _Batch:
    def __init__(self, logits: list[float], done_at: float) -> None:
        self._logits = logits
        self._done_at = done_at

    def wait(self) -> list[float]:
        """Sleep until the batch is done, and return its logits."""
        time.sleep(max(self._done_at - time.perf_counter(), 0.0))
        return self._logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to the common options."""
    parser.add_argument("--compute-ms", type=float, default=5.0, help="time of a batch; default: 5")
    parser.add_argument("--host-ms", type=float, default=1.0, help="time of a launch; default: 1")
    parser.add_argument("--num-batches", type=int, default=400, help="batches per figure; default: 400")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject options that cannot work."""
    if min(args.compute_ms, args.host_ms) <= 0 or args.num_batches < 1:
        parser.error("--compute-ms, --host-ms and --num-batches must be positive")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    document = report.begin(args, "compute_ms", "host_ms", "num_batches")
    document["loads"] = [
        {"load": name, "depth": depth, **_measure(args, depth, num_callers, num_sequences)}
        for name, num_callers, num_sequences in _LOADS
        for depth in _DEPTHS
    ]
    rows = [
        (
            f"{each['load']}, depth {each['depth']}",
            [f"{100 * each['busy_share']:.1f} %", f"{each['requests_per_s']:.0f}", f"{each['num_batches']}"],
        )
        for each in document["loads"]
    ]
    report.print_table("simulated device", ["busy", "requests/s", "batches"], rows)
    return report.end(document, missing={}, problems=[])


def _measure(
    args: argparse.Namespace, depth: int, num_callers: int, num_sequences: int | None
) -> dict[str, Any]:
    """Let callers ask, each again as soon as it has its answer, until the device has had enough batches."""
    device = SimulatedDevice(compute_s=args.compute_ms / 1000, host_s=args.host_ms / 1000, depth=depth)
    batcher = MicroBatcher([device.replica()])
    sequences = [np.full(_LENGTH, 1, np.int32)] * (
        num_sequences or args.num_batches * _MAX_BATCH_TOKENS // _LENGTH
    )
    lock = threading.Lock()
    num_requests = 0

    def ask() -> None:
        nonlocal num_requests
        while device.num_batches < args.num_batches:
            request = Request()
            batcher.add(request, sequences)
            request.future.result()
            with lock:
                num_requests += 1

    began = time.perf_counter()
    _in_threads(ask, num_callers)
    wall_s = time.perf_counter() - began
    batcher.close()
    return {
        "busy_share": device.busy_share,
        "requests_per_s": num_requests / wall_s,
        "num_batches": device.num_batches,
    }


def _in_threads(function: Callable[[], None], num_threads: int) -> None:
    threads = [threading.Thread(target=function) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
