"""Splits a batch over the cores of a CPU, so that each core computes its own sequences."""

from __future__ import annotations

import heapq
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from itertools import product
from queue import SimpleQueue
from typing import Final

import torch
from torch import Tensor

# Imported for its side effect, which must be complete before a thread of this module computes.
import bge_rerank_integrations.engine.cpu.first_calls  # noqa: F401
from bge_rerank_integrations.engine.cpu.thread_count import keep_default
from bge_rerank_integrations.engine.packing import PackedBatch, Seqlens
from bge_rerank_integrations.runtime.locks import SafeLock
from bge_rerank_integrations.runtime.shutdown import end_at_exit, join_until
from bge_rerank_integrations.runtime.tracebacks import release_frames

Forward = Callable[[PackedBatch], Tensor]
"""Maps a packed batch of B sequences to its logits, float32 [B], on the device."""

_Task = tuple[Forward, PackedBatch, "Future[list[float]]"]

# Relative difference between the costs of two parts below which trading sequences is not worth the time.
_NEAR_ENOUGH: Final = 0.01


class SplitForward:
    """Runs the parts of a batch in parallel, one thread per part. Any number of threads may call it.

    If threads share each operation, they wait for each other after every operation. If each thread has its
    own sequences, they wait only once, at the end. A batch with fewer sequences than threads is not split.
    Then torch shares each operation between the threads, as usual.

    Args:
        forward: Runs a batch. It is called from several threads at once.
        num_threads: Number of threads that compute.
        length_of_double_cost: See `split_evenly`.
        row_multiple: Parts of a batch are padded to a multiple of this number of rows.
    """

    def __init__(
        self,
        forward: Forward,
        num_threads: int,
        length_of_double_cost: int,
        row_multiple: int = 1,
    ) -> None:
        self._forward = forward
        self._num_threads = num_threads
        self._length_of_double_cost = length_of_double_cost
        self._row_multiple = row_multiple
        self._start = SafeLock()
        self._threads: _Threads | None = None

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the logits of the B sequences, float32 [B]."""
        lengths = batch.seqlens.lengths
        if self._num_threads == 1 or len(lengths) < self._num_threads:
            return self._forward(batch)
        parts = split_evenly(lengths, self._num_threads, self._length_of_double_cost)
        tasks: list[_Task] = [
            (self._forward, select(batch, part, self._row_multiple), Future()) for part in parts
        ]
        if not self._require_threads().put(tasks):
            return self._forward(batch)  # the interpreter is exiting and the threads have ended
        futures = [future for _, _, future in tasks]
        # Wait for all parts, so that no part is still running when the error of another part is raised.
        wait(futures)
        logits = torch.empty(len(lengths), dtype=torch.float32)
        for part, future in zip(parts, futures, strict=True):
            logits[part] = torch.tensor(future.result(), dtype=torch.float32)
        return logits

    def _require_threads(self) -> _Threads:
        with self._start:
            if self._threads is None:
                self._threads = _Threads(self._num_threads)
                # The threads must not refer to this object, or it would never be collected.
                weakref.finalize(self, self._threads.end).atexit = False  # `_end_all` does it at exit
            return self._threads


def split_evenly(lengths: Sequence[int], num_parts: int, length_of_double_cost: int) -> list[list[int]]:
    """Split sequences into parts of about equal cost.

    Each sequence, longest first, goes to the part with the lowest cost so far. Then parts trade sequences
    while that makes the costs more equal.

    Args:
        lengths: Number of tokens of each sequence.
        num_parts: Most parts to return.
        length_of_double_cost: The length in tokens at which attention costs as much as all other operations
            together. The cost of attention per token grows with the length of the sequence.

    Returns:
        Parts of indices into `lengths`, ascending within each part. No part is empty.

    Example:
        >>> split_evenly([100, 60, 50, 10], 2, 4096)
        [[0, 3], [1, 2]]
    """
    costs = [length * (1 + length / length_of_double_cost) for length in lengths]
    parts: list[list[int]] = [[] for _ in range(min(num_parts, len(lengths)))]
    loads = [(0.0, number) for number in range(len(parts))]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, number = loads[0]
        parts[number].append(index)
        heapq.heapreplace(loads, (load + costs[index], number))
    for _ in costs:
        if not _trade(parts, costs):
            break
    return [sorted(part) for part in parts]


def _trade(parts: list[list[int]], costs: Sequence[float]) -> bool:
    """Trade two sequences between the parts of highest and lowest cost; return False if no trade helps."""

    def cost(part: Sequence[int]) -> float:
        return sum(costs[index] for index in part)

    most, least = max(parts, key=cost), min(parts, key=cost)
    gap = cost(most) - cost(least)
    if gap < _NEAR_ENOUGH * cost(most):
        return False
    given, taken = min(
        product(most, least), key=lambda pair: abs(gap - 2 * (costs[pair[0]] - costs[pair[1]]))
    )
    if not 0 < costs[given] - costs[taken] < gap:
        return False
    most[most.index(given)], least[least.index(taken)] = taken, given
    return True


def select(batch: PackedBatch, indices: Sequence[int], row_multiple: int = 1) -> PackedBatch:
    """Return a batch with some of the sequences of another batch.

    Args:
        batch: The batch to select from.
        indices: Indices of the sequences to select.
        row_multiple: The result is padded to a multiple of this number of rows. The padding has id 0 and
            position 0, which every model has.
    """
    bounds = batch.seqlens.cu_seqlens.tolist()
    slices = [slice(bounds[index], bounds[index + 1]) for index in indices]
    lengths = tuple(batch.seqlens.lengths[index] for index in indices)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    filling = batch.ids.new_zeros(-sum(lengths) % row_multiple)
    return PackedBatch(
        torch.cat([*(batch.ids[part] for part in slices), filling]),
        torch.cat([*(batch.positions[part] for part in slices), filling]),
        Seqlens(lengths, cu_seqlens, max(lengths)),
    )


class _Threads:
    """Daemon threads that compute parts of batches until `end` is called.

    Args:
        num_threads: Number of threads to start.
    """

    def __init__(self, num_threads: int) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._ending = SafeLock()
        self._has_ended = False
        ready = threading.Barrier(num_threads + 1)
        self._threads = [
            threading.Thread(
                target=_work, args=(self._tasks, ready), name=f"bge-rerank-cpu-{number}", daemon=True
            )
            for number in range(num_threads)
        ]
        keep_default(lambda: _start(self._threads, ready))
        _live.add(self)

    def put(self, tasks: Sequence[_Task]) -> bool:
        """Queue tasks for the threads. Return False, and queue nothing, if `end` has been called."""
        with self._ending:
            if not self._has_ended:
                for task in tasks:
                    self._tasks.put(task)
            return not self._has_ended

    def end(self, deadline: float | None = None) -> None:
        """Tell the threads to end after all queued tasks, and wait for them.

        Args:
            deadline: Time at which to stop waiting, by `time.monotonic`; None for no limit.
        """
        with self._ending:
            if not self._has_ended:
                self._has_ended = True
                for _ in self._threads:
                    self._tasks.put(None)
        # The garbage collector may call this method in one of these threads.
        join_until(self._threads, deadline)


_live: weakref.WeakSet[_Threads] = weakref.WeakSet()


def _start(threads: Sequence[threading.Thread], ready: threading.Barrier) -> None:
    """Start threads and wait until each has set its number of torch threads."""
    try:
        for thread in threads:
            thread.start()
        ready.wait()
    except BaseException:  # such as too many threads in the process
        ready.abort()
        join_until([thread for thread in threads if thread.ident is not None], None)
        raise


def _work(tasks: SimpleQueue[_Task | None], ready: threading.Barrier) -> None:
    torch.get_num_threads()  # the first use of torch in a thread overwrites its number
    torch.set_num_threads(1)
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        return  # another thread could not be started
    while (task := tasks.get()) is not None:
        forward, batch, future = task
        del task
        values: list[float] = []
        failure: BaseException | None = None
        try:
            values = forward(batch).tolist()
        except BaseException as error:  # the caller waits for this future, so every error must reach it
            release_frames(error)
            failure = error
        # Free every tensor before setting the result. torch releases the interpreter's lock while it frees a
        # tensor. Once the result is set, the main thread may start to finalize the interpreter. Python then
        # terminates any thread that requests the lock, inside C++ code, which aborts the process. For the
        # same reason the result consists of floats, and the frames of an error are released.
        del forward, batch
        if failure is None:
            future.set_result(values)
        else:
            future.set_exception(failure)
        del future, failure


def _end_all(deadline: float) -> None:
    """End all threads at interpreter exit, before Python terminates them; see `_work`."""
    for threads in list(_live):
        threads.end(deadline)


end_at_exit(_end_all)
