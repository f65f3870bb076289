"""What the parts of `ray` share: rows, a cluster on this machine, and the processes of a cluster."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.common import PairMaker, Pairs
from benchmarks.models import Setup
from bge_rerank_integrations.errors import missing_extra

try:
    import ray
    from ray.data import DataContext
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

TOLERANCE: Final = 1e-5
"""Largest allowed difference between two scores of the same pair in float32."""
ROWS_PER_BLOCK: Final = 512
# More CPUs than the machine may have: they limit how many processes Ray starts, not how many cores they use.
_NUM_CPUS: Final = 8
_OBJECT_STORE_BYTES: Final = 256 * 1024 * 1024
_SHARED_MEMORY: Final = Path("/dev/shm")
_SAMPLING_S: Final = 0.2
_PAIRS_PER_QUERY: Final = 50


def make_pairs(setup: Setup, num_pairs: int, seed: int) -> Pairs:
    """Generate pairs of 32 tokens, 50 for each query."""
    maker = PairMaker(setup.tokenizer_path)
    pairs: Pairs = []
    while len(pairs) < num_pairs:
        pairs += maker.pairs(_PAIRS_PER_QUERY, seed + len(pairs), length=32)
    return pairs[:num_pairs]


@contextmanager
def local_cluster() -> Iterator[None]:
    """Start Ray on this machine with a small object store, and stop it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=_NUM_CPUS,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def descendants(ancestor: int, name: bytes) -> list[int]:
    """Return the processes below a process whose command line contains a name."""
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            stat = (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # the process has ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        if name in command:
            found.append(int(folder.name))
    return sorted(pid for pid in found if ancestor in _ancestors(pid, parents))


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        pid = parents[pid]
        yield pid


class PeakSharedMemory:
    """Samples the used shared memory of the machine, where Ray's object store lies."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._before = shutil.disk_usage(_SHARED_MEMORY).used
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakSharedMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(_SAMPLING_S):
            used = shutil.disk_usage(_SHARED_MEMORY).used - self._before
            self.peak_mib = max(self.peak_mib, used / 2**20)
