"""A forward pass over the cores of a CPU: each takes some of the sequences and never waits for the others."""

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

from bge_rerank_integrations.engine.batch import PackedBatch, Seqlens

Forward = Callable[[PackedBatch], Tensor]
"""A packed batch to its B logits, float32 [B], on the device."""

_Task = tuple[Forward, PackedBatch, "Future[Tensor]"]

# A difference between two parts that trading sequences would not pay for.
_NEAR_ENOUGH: Final = 0.01


class SplitForward:
    """Runs parts of a batch side by side, each on one thread; safe under any number of callers.

    Threads that share each operation wait for each other after each; threads with sequences of their own
    wait once, at the end. Where there are fewer sequences than threads, operations are shared as usual.

    Args:
        forward: Runs a batch; from several threads at once.
        num_threads: How many.
        length_of_double_cost: As `split_evenly` takes it.
    """

    def __init__(self, forward: Forward, num_threads: int, length_of_double_cost: int) -> None:
        self._forward = forward
        self._num_threads = num_threads
        self._length_of_double_cost = length_of_double_cost
        self._start = threading.Lock()
        self._tasks: SimpleQueue[_Task | None] | None = None

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the B logits."""
        lengths = batch.seqlens.lengths
        if self._num_threads == 1 or len(lengths) < self._num_threads:
            return self._forward(batch)
        parts = split_evenly(lengths, self._num_threads, self._length_of_double_cost)
        tasks = self._require_threads()
        futures: list[Future[Tensor]] = [Future() for _ in parts]
        for part, future in zip(parts, futures, strict=True):
            tasks.put((self._forward, select(batch, part), future))
        # All of them, so that nothing is still running when an error of one comes through.
        wait(futures)
        logits = torch.empty(len(lengths))
        for part, future in zip(parts, futures, strict=True):
            logits[torch.tensor(part)] = future.result()
        return logits

    def _require_threads(self) -> SimpleQueue[_Task | None]:
        with self._start:
            if self._tasks is None:
                self._tasks = _start_threads(self, self._num_threads)
            return self._tasks


def split_evenly(lengths: Sequence[int], num_parts: int, length_of_double_cost: int) -> list[list[int]]:
    """Deal sequences out so that each part costs about the same: longest first, then by trading.

    Args:
        lengths: Tokens of each sequence.
        num_parts: Most parts.
        length_of_double_cost: From so many tokens on, attention, which grows with the square, costs a token
            as much as all else does.

    Returns:
        Indices into `lengths`, ascending in each part; no part is empty.

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
    """Bring the parts that cost most and least nearer by trading two sequences; return whether it can be."""

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


def select(batch: PackedBatch, indices: Sequence[int]) -> PackedBatch:
    """Return a batch of some of the sequences of another."""
    bounds = batch.seqlens.cu_seqlens.tolist()
    slices = [slice(bounds[index], bounds[index + 1]) for index in indices]
    lengths = tuple(batch.seqlens.lengths[index] for index in indices)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    return PackedBatch(
        torch.cat([batch.ids[part] for part in slices]),
        torch.cat([batch.positions[part] for part in slices]),
        Seqlens(lengths, cu_seqlens, max(lengths)),
    )


def _start_threads(owner: SplitForward, num_threads: int) -> SimpleQueue[_Task | None]:
    """Start daemon threads that take tasks until their owner is gone."""
    tasks: SimpleQueue[_Task | None] = SimpleQueue()
    ready = threading.Barrier(num_threads + 1)
    threads = [
        threading.Thread(target=_work, args=(tasks, ready), name=f"bge-rerank-cpu-{number}", daemon=True)
        for number in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    ready.wait()
    # torch gives threads that come later what was last set by any thread; this thread's is as it was.
    torch.set_num_threads(torch.get_num_threads())
    # Not at interpreter exit, when a last batch may still be on its way to them.
    weakref.finalize(owner, _end_threads, tasks, threads).atexit = False
    return tasks


def _work(tasks: SimpleQueue[_Task | None], ready: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first use of torch sets the number anew
    torch.set_num_threads(1)
    ready.wait()
    while (task := tasks.get()) is not None:
        forward, batch, future = task
        try:
            result = forward(batch)
        except BaseException as error:  # whoever waits must not wait for ever
            future.set_exception(error)
        else:
            future.set_result(result)
        # Nothing of a model may stay alive because its last batch is remembered here.
        del forward, batch, future, task


def _end_threads(tasks: SimpleQueue[_Task | None], threads: Sequence[threading.Thread]) -> None:
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        # Waited for, since a thread that ends while the interpreter does can take the process with it. They
        # are idle, or nothing would be waiting for them; garbage may be collected in one of them, though.
        if thread is not threading.current_thread():
            thread.join()
