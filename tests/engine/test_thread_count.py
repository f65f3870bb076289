"""The number of torch threads: what this package sets for its own threads does not reach other threads."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine import runner as runner_module
from bge_rerank_integrations.engine.build import build_model
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.cpu.parallel import SplitForward
from bge_rerank_integrations.engine.cpu.thread_count import call_with_threads, keep_default, set_thread_count
from bge_rerank_integrations.engine.cuda.transfer import PlainTransfer
from bge_rerank_integrations.engine.packing import pack
from bge_rerank_integrations.engine.runner import Runner, load_runners
from tests.support.engine import CPU, random_ids, score_all
from tests.support.interrupts import Interrupt
from tests.support.queues import wait_until
from tests.support.threads import in_new_thread, refuse_to_start


def default_threads() -> int:
    """Return the number of torch threads that a new thread has."""
    seen: list[int] = []
    in_new_thread(lambda: seen.append(torch.get_num_threads()))
    return seen[0]


def test_num_threads_applies_to_the_thread_that_launches_and_to_no_other() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def forward(batch: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        in_new_thread(lambda: seen.append(torch.get_num_threads()))
        return torch.zeros(len(batch.seqlens.lengths))

    wanted = before + 3
    runner = Runner(forward, device=CPU, padding_idx=1, max_batch_tokens=100, num_threads=wanted)
    in_new_thread(lambda: score_all(runner, random_ids([5, 7], 100)))
    assert seen == [wanted, before]
    in_new_thread(lambda: seen.append(torch.get_num_threads()))
    assert seen == [wanted, before, before]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("fails", [False, True])
def test_loading_leaves_the_number_of_torch_threads(
    fails: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def build(spec: Any) -> Any:
        seen.append(torch.get_num_threads())
        in_new_thread(lambda: seen.append(torch.get_num_threads()))
        if fails:
            raise RuntimeError("broken")
        return build_model(spec)

    monkeypatch.setattr(runner_module, "build_model", build)
    config = ScorerConfig(model=checkpoint, device="cpu", dtype="float32", num_threads=before + 3)
    with pytest.raises(RuntimeError, match="broken") if fails else nullcontext():
        load_runners(config, checkpoint, read_shape(checkpoint))
    in_new_thread(lambda: seen.append(torch.get_num_threads()))
    assert seen == [before + 3, before, before]
    assert torch.get_num_threads() == before


def test_loading_onto_a_gpu_leaves_the_number_of_torch_threads(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its speed is measured while it loads, by launching batches in the thread of the caller."""
    device = torch.device("meta")
    model = SimpleNamespace(
        forward=lambda batch: torch.zeros(len(batch.seqlens.lengths)), row_multiple=1, graphs=None
    )

    class Transfer(PlainTransfer):
        def download(self, logits: Tensor) -> Callable[[], list[float]]:
            return lambda: [0.0] * len(logits)

    monkeypatch.setattr(runner_module, "resolve_device", lambda _: device)
    monkeypatch.setattr(runner_module, "resolve_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(runner_module, "resolve_max_batch_tokens", lambda *_: 8192)
    monkeypatch.setattr(runner_module, "build_model", lambda _: model)
    monkeypatch.setattr(runner_module, "resolve_transfer", lambda *_: Transfer(device))
    before = torch.get_num_threads()
    config = ScorerConfig(model=checkpoint, num_threads=before + 3)
    (runner,) = load_runners(config, checkpoint, read_shape(checkpoint))
    assert torch.get_num_threads() == before
    assert runner.max_batch_tokens <= 8192


def test_a_process_with_too_many_threads_still_sets_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before, default = torch.get_num_threads(), default_threads()
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", refuse_to_start)
        assert call_with_threads(before + 3, torch.get_num_threads) == before + 3
        assert torch.get_num_threads() == before
    assert default_threads() == default


def test_a_pool_that_starts_only_partly_leaves_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread,
        "start",
        lambda self: (refuse_to_start if self.name == "bge-rerank-cpu-2" else start)(self),
    )
    before, default = set(threading.enumerate()), default_threads()
    split = SplitForward(lambda batch: batch.ids.float(), 3, 1024)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            split(pack(random_ids([4, 5, 6], 1000), padding_idx=1, device=CPU))
    assert set(threading.enumerate()) == before
    assert default_threads() == default


def test_threads_that_set_their_number_at_the_same_time_keep_the_default() -> None:
    before = default_threads()
    meeting = threading.Barrier(8)
    seen: list[int] = []

    def change(num_threads: int) -> None:
        meeting.wait()
        set_thread_count(num_threads)
        seen.append(torch.get_num_threads())

    threads = [threading.Thread(target=change, args=(before + number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [before + number for number in range(8)]
    assert default_threads() == before


def test_the_default_is_kept_after_an_error() -> None:
    before = default_threads()

    def fail() -> None:
        torch.get_num_threads()
        torch.set_num_threads(before + 1)
        raise RuntimeError("broken")

    def change() -> None:
        with suppress(RuntimeError):
            keep_default(fail)

    in_new_thread(change)
    assert default_threads() == before


def test_an_interrupt_after_any_call_keeps_the_default_and_leaves_no_thread() -> None:
    before, num_threads = default_threads(), _thread._count()
    for number in count():
        interrupt = Interrupt(number)

        def change(arm: Callable[[], None] = interrupt.arm) -> None:
            arm()
            set_thread_count(torch.get_num_threads() + 1)

        interrupt.call(change)
        wait_until(lambda: _thread._count() == num_threads)
        assert default_threads() == before
        if not interrupt.is_reached:
            break
    set_thread_count(before)
    assert number > 10
