"""Several batches at once: the order of launches and reads, and out-of-memory errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from bge_rerank_integrations.engine.cuda.transfer import (
    PinnedTransfer,
    PlainTransfer,
    Transfer,
    resolve_transfer,
)
from bge_rerank_integrations.engine.packing import PackedBatch, pack
from bge_rerank_integrations.engine.runner import Runner
from tests.support.engine import CPU, LimitedMemory, numbered, score_all


class Pipelined(PlainTransfer):
    """Runs two batches at once. A batch uses memory from its launch until it is read."""

    depth = 2

    def __init__(self) -> None:
        super().__init__(CPU)
        self.events: list[str] = []
        self.tokens_under_way: list[int] = []

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        values = [int(value) for value in logits]
        self.events.append(f"launch {values}")

        def read() -> list[float]:
            self.events.append(f"read {values}")
            self.tokens_under_way.pop(0)
            return [float(value) for value in values]

        return read


class SharedMemory:
    """A forward pass that uses memory until its result is read."""

    def __init__(self, transfer: Pipelined, max_tokens: int) -> None:
        self.transfer = transfer
        self.max_tokens = max_tokens
        self.num_failures = 0

    def __call__(self, batch: PackedBatch) -> Tensor:
        under_way = self.transfer.tokens_under_way
        if sum(under_way) + len(batch.ids) > self.max_tokens:
            self.num_failures += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        under_way.append(len(batch.ids))
        return batch.ids[batch.seqlens.cu_seqlens[:-1]].float()


def runner_of(forward: Callable[[PackedBatch], Tensor], transfer: Transfer, budget: int = 100) -> Runner:
    return Runner(forward, device=CPU, padding_idx=1, max_batch_tokens=budget, transfer=transfer)


def test_with_depth_1_a_batch_is_read_before_the_next_is_launched() -> None:
    transfer = Pipelined()
    transfer.depth = 1
    runner = runner_of(SharedMemory(transfer, 100), transfer)
    assert score_all(runner, numbered([60, 60, 60])) == [0, 1, 2]
    assert transfer.events == ["launch [0]", "read [0]", "launch [1]", "read [1]", "launch [2]", "read [2]"]
    assert runner.num_splits == 0


def test_out_of_memory_beside_another_batch_does_not_lower_the_budget() -> None:
    transfer = Pipelined()
    runner = runner_of(SharedMemory(transfer, 100), transfer)
    first, second = ([sequence] for sequence in numbered([60, 61]))
    running = runner.launch(first)
    assert running is not None
    assert runner.launch(second, is_alone=False) is None
    assert (runner.num_splits, runner.max_batch_tokens) == (0, 100)
    assert running.wait() == [0]
    alone = runner.launch(second)
    assert alone is not None
    assert alone.wait() == [1]


def test_a_batch_that_does_not_fit_alone_is_split() -> None:
    transfer = Pipelined()
    runner = runner_of(SharedMemory(transfer, 100), transfer, budget=300)
    done: list[int] = []
    lengths = [70, 60, 50, 40, 30, 20, 10, 90]
    assert score_all(runner, numbered(lengths), on_progress=done.append) == list(range(len(lengths)))
    assert runner.num_splits > 0
    assert runner.max_batch_tokens <= 150
    assert sum(done) == len(lengths)


def test_after_a_sequence_that_does_not_fit_the_next_request_works() -> None:
    transfer = Pipelined()
    runner = runner_of(LimitedMemory(100), transfer)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        score_all(runner, numbered([101, 50, 60]))
    transfer.tokens_under_way = [0] * 100
    assert score_all(runner, numbered([50, 60])) == [0, 1]


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_error_is_raised_unchanged_and_running_batches_are_read(fails_at: int) -> None:
    transfer = Pipelined()
    inner = SharedMemory(transfer, 10**6)
    error = RuntimeError("CUDA error: device-side assert")
    calls: list[int] = []

    def forward(batch: PackedBatch) -> Tensor:
        calls.append(len(batch.ids))
        if len(calls) == fails_at:
            raise error
        return inner(batch)

    with pytest.raises(RuntimeError) as caught:
        score_all(runner_of(forward, transfer), numbered([60, 60, 60]))
    assert caught.value is error
    assert len(calls) == fails_at
    launched = [event.removeprefix("launch ") for event in transfer.events if event.startswith("launch")]
    read = [event.removeprefix("read ") for event in transfer.events if event.startswith("read")]
    assert read == launched, "no batch is still running after the call"


def test_a_runner_holds_as_many_batches_as_its_transfer() -> None:
    transfer = Pipelined()
    forward = SharedMemory(transfer, 10**6)
    assert runner_of(forward, transfer).depth == 2
    assert runner_of(forward, PlainTransfer(CPU)).depth == 1


def test_logits_come_back_in_the_order_of_the_call() -> None:
    runner = runner_of(LimitedMemory(1000), PlainTransfer(CPU))
    pending = runner.launch(numbered([3, 50, 1, 50, 20]))
    assert pending is not None
    assert pending.wait() == [0, 1, 2, 3, 4]


def test_a_cpu_uses_plain_copies() -> None:
    transfer = resolve_transfer(CPU, 1000)
    assert isinstance(transfer, PlainTransfer)
    sequences = [np.array([0, 7, 2], dtype=np.int32), np.array([0, 2], dtype=np.int32)]
    plain = pack(sequences, padding_idx=1, device=CPU)
    ours = pack(sequences, padding_idx=1, device=CPU, upload=transfer.upload)
    assert torch.equal(ours.ids, plain.ids)
    assert torch.equal(ours.seqlens.cu_seqlens, plain.seqlens.cu_seqlens)
    assert transfer.download(torch.tensor([1.5, 2.5]))() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("tokens_per_s", "budget"),
    [(2_000_000, 16_384), (100_000, 5000), (4000, 1024)],
)
def test_the_token_budget_of_a_gpu_follows_its_speed(tokens_per_s: int, budget: int) -> None:
    """A batch takes 50 ms at most, unless the device is so slow that such a batch would not fill it."""
    now = 0.0

    def forward(batch: PackedBatch) -> Tensor:
        nonlocal now
        now += len(batch.ids) / tokens_per_s
        return torch.zeros(len(batch.seqlens.lengths))

    runner = runner_of(forward, PlainTransfer(CPU), budget=16_384)
    runner.limit_batch_time(512, clock=lambda: now)
    assert runner.max_batch_tokens == pytest.approx(budget, abs=1)


@pytest.mark.parametrize("max_length", [16, 64, 512, 8192])
def test_the_token_budget_of_a_gpu_does_not_depend_on_the_time_of_a_launch(max_length: int) -> None:
    """A launch takes 4 ms, and the device computes a million tokens per second. 16,384 tokens take 20 ms."""
    now = 0.0

    def forward(batch: PackedBatch) -> Tensor:
        nonlocal now
        now += 0.004 + len(batch.ids) / 1_000_000
        return torch.zeros(len(batch.seqlens.lengths))

    runner = runner_of(forward, PlainTransfer(CPU), budget=16_384)
    runner.limit_batch_time(max_length, clock=lambda: now)
    assert runner.max_batch_tokens == 16_384


def test_a_measured_budget_is_the_one_to_which_it_grows_back() -> None:
    now = 0.0
    memory = LimitedMemory(10**6)

    def forward(batch: PackedBatch) -> Tensor:
        nonlocal now
        now += len(batch.ids) / 100_000
        return memory(batch)

    runner = runner_of(forward, PlainTransfer(CPU), budget=16_384)
    runner.limit_batch_time(512, clock=lambda: now)
    memory.max_tokens = 2000
    score_all(runner, numbered([100] * 60))
    assert runner.max_batch_tokens <= 2000
    memory.max_tokens = 10**6
    for _ in range(400):
        score_all(runner, numbered([50, 50]))
    assert runner.max_batch_tokens == pytest.approx(5000, abs=1)


class FakeEvent:
    """An event of a stand-in device on which all work is complete at once."""

    made: ClassVar[list[FakeEvent]] = []
    selected: ClassVar[list[object]] = []
    """The devices that are selected in blocks, the innermost last."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.blocking = blocking
        self.num_records = self.num_waits = 0
        self.waited_on: object = None
        FakeEvent.made.append(self)

    def record(self, stream: object = None) -> None:
        self.num_records += 1

    def synchronize(self) -> None:
        self.num_waits += 1
        self.waited_on = FakeEvent.selected[-1] if FakeEvent.selected else None


@contextmanager
def select_device(device: object) -> Iterator[None]:
    FakeEvent.selected.append(device)
    yield
    FakeEvent.selected.pop()


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> PinnedTransfer:
    """Pinned copies to a stand-in for a CUDA device, whose memory is that of the CPU."""
    FakeEvent.made.clear()
    real_empty = torch.empty

    def empty(size: int, *, pin_memory: bool = False, device: object = None, **options: Any) -> Tensor:
        return real_empty(size, **options)

    for name, value in {
        "Event": FakeEvent,
        "current_stream": lambda _: None,
        "device": select_device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", empty)
    return PinnedTransfer(CPU, 100)


def test_pinned_copies_wait_without_using_a_core(pinned: PinnedTransfer) -> None:
    sequences = [np.array([0, 7, 2], dtype=np.int32), np.array([0, 2], dtype=np.int32)]
    for _ in range(3):
        plain = pack(sequences, padding_idx=1, device=CPU)
        ours = pack(sequences, padding_idx=1, device=CPU, upload=pinned.upload)
        assert torch.equal(ours.ids, plain.ids)
        assert torch.equal(ours.seqlens.cu_seqlens, plain.seqlens.cu_seqlens)
        assert pinned.download(torch.tensor([1.5, 2.5]))() == [1.5, 2.5]
    waited = [event for event in FakeEvent.made if event.num_waits]
    assert len(waited) == 5, "both slots, and each download"
    assert all(event.blocking for event in FakeEvent.made)


def test_a_thread_that_reads_selects_the_device_that_computes(pinned: PinnedTransfer) -> None:
    """Otherwise CUDA would create a context on the first GPU."""
    read = pinned.download(torch.tensor([1.5]))
    assert FakeEvent.selected == []
    assert read() == [1.5]
    assert FakeEvent.made[-1].waited_on == CPU
    assert FakeEvent.selected == []


def test_an_upload_leaves_the_previous_one_as_it_is(pinned: PinnedTransfer) -> None:
    first = pinned.upload([np.array([1, 2], dtype=np.int32)])
    second = pinned.upload([np.array([3], dtype=np.int32), np.array([4], dtype=np.int32)])
    assert (first.tolist(), second.tolist()) == ([1, 2], [3, 4])
    third = pinned.upload([np.array([5, 6], dtype=np.int32)])
    assert (second.tolist(), third.tolist()) == ([3, 4], [5, 6])
