"""A batch that is split over threads gives the same logits as the whole batch, and handles errors."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bge_rerank_integrations.engine.cpu.parallel import SplitForward, select, split_evenly
from bge_rerank_integrations.engine.packing import PackedBatch, pack
from tests.support.engine import CPU, random_ids
from tests.support.queues import PATIENCE_S
from tests.support.threads import in_new_thread


def batch_of(lengths: list[int], seed: int = 0) -> PackedBatch:
    return pack(random_ids(lengths, 1000, seed), padding_idx=1, device=CPU)


def sums(batch: PackedBatch) -> Tensor:
    """Return a number for each sequence that depends on its token ids and position ids."""
    rows = batch.ids.double() * 1000 + batch.positions
    return torch.stack([part.sum() for part in rows.split(list(batch.seqlens.lengths))]).float()


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("bge-rerank-cpu")}


@pytest.mark.parametrize("num_parts", [1, 2, 3, 16])
@pytest.mark.parametrize("lengths", [[5], [9, 3, 3, 3], [512, 1, 1, 1, 1], list(range(1, 60))])
def test_split_evenly_puts_every_sequence_into_one_part(lengths: Sequence[int], num_parts: int) -> None:
    parts = split_evenly(lengths, num_parts, 1024)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    assert len(parts) == min(num_parts, len(lengths))


def test_split_evenly_makes_parts_of_about_equal_cost() -> None:
    lengths = [int(length) for length in torch.randint(20, 500, (200,), generator=torch.manual_seed(0))]
    loads = [sum(lengths[index] for index in part) for part in split_evenly(lengths, 4, 1 << 20)]
    assert max(loads) < 1.1 * min(loads)


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        # Without trading, the parts have 935 and 1,097 tokens.
        ([446, 408, 260, 256, 247, 233, 182], 1070),
        # Without trading, the parts have 198 and 201 tokens.
        ([50, 50, 50, 50, 49, 49, 49, 49, 3], 200),
        ([512, 3, 3], 512),
    ],
)
def test_split_evenly_trades_long_sequences_between_parts(lengths: list[int], most: int) -> None:
    parts = split_evenly(lengths, 2, 1 << 30)
    assert max(sum(lengths[index] for index in part) for part in parts) <= most


def test_split_evenly_includes_the_cost_of_attention() -> None:
    # By the number of tokens, 1,000 and 600 + 400 would be equal.
    lengths = [1000, 600, 400, 100]
    by_cost = {frozenset(part) for part in split_evenly(lengths, 2, 100)}
    assert by_cost == {frozenset({0}), frozenset({1, 2, 3})}


def test_a_selected_part_equals_a_packed_batch_of_its_sequences() -> None:
    batch = batch_of([7, 5, 9, 3])
    part = select(batch, [1, 3])
    alone = pack(random_ids([7, 5, 9, 3], 1000)[1::2], padding_idx=1, device=CPU)
    assert torch.equal(part.ids, alone.ids)
    assert torch.equal(part.positions, alone.positions)
    assert part.seqlens.lengths == alone.seqlens.lengths
    assert torch.equal(part.seqlens.cu_seqlens, alone.seqlens.cu_seqlens)
    assert part.seqlens.cu_seqlens.dtype is torch.int32
    assert part.seqlens.max_seqlen == 5


def test_a_selected_part_is_padded_to_the_rows_of_linear_layers() -> None:
    part = select(batch_of([7, 5, 9, 3]), [1, 3], 16)
    assert len(part.ids) == len(part.positions) == 16
    assert part.ids[8:].tolist() == part.positions[8:].tolist() == [0] * 8
    assert part.seqlens.lengths == (5, 3)


def test_every_part_of_a_split_batch_is_padded_to_the_rows_of_linear_layers() -> None:
    seen: list[int] = []

    def forward(batch: PackedBatch) -> Tensor:
        seen.append(len(batch.ids))
        return torch.zeros(len(batch.seqlens.lengths))

    SplitForward(forward, 2, 1024, 16)(batch_of([33, 20, 3]))
    assert sorted(seen) == [32, 48]


def test_the_frames_of_a_raised_error_hold_no_local_variables() -> None:
    def forward(batch: PackedBatch) -> Tensor:
        large = torch.zeros(1000)
        raise MemoryError(f"{len(large)} too many")

    with pytest.raises(MemoryError, match="1000 too many") as raised:
        SplitForward(forward, 2, 1024)(batch_of([5, 4]))
    frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
    assert frames[-1].f_code.co_name == "forward", "the traceback still names the function"
    assert not frames[-1].f_locals


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_split_logits_equal_whole_logits_with_several_callers(num_threads: int) -> None:
    split = SplitForward(sums, num_threads, 1024)
    batches = [batch_of([seed + 1, 40, 3, 9, 200, 7][: seed % 6 + 1], seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for batch, logits in zip(batches, pool.map(split, batches), strict=True):
            assert torch.equal(logits, sums(batch))


def test_parts_run_in_parallel_on_one_thread_each() -> None:
    meeting = threading.Barrier(3, timeout=PATIENCE_S)
    seen: list[int] = []

    def forward(batch: PackedBatch) -> Tensor:
        seen.append(torch.get_num_threads())
        meeting.wait()
        return sums(batch)

    SplitForward(forward, 3, 1024)(batch_of([4, 5, 6]))
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("is_new", [False, True], ids=["a thread that has used torch", "a new thread"])
def test_other_threads_keep_their_number_of_torch_threads(is_new: bool) -> None:
    before = torch.get_num_threads()
    batch = batch_of([4, 5])
    seen: list[int] = []

    def split() -> None:
        SplitForward(sums, 2, 1024)(batch)
        seen.append(torch.get_num_threads())

    if is_new:
        in_new_thread(split)
    else:
        split()
    in_new_thread(lambda: seen.append(torch.get_num_threads()))
    assert seen == [before, before]
    assert torch.get_num_threads() == before


def test_an_error_of_one_part_is_raised_after_all_parts_have_ended() -> None:
    running = threading.Semaphore(0)

    def forward(batch: PackedBatch) -> Tensor:
        if batch.seqlens.lengths == (9,):
            raise MemoryError("too long")
        time.sleep(0.05)
        running.release()
        return sums(batch)

    split = SplitForward(forward, 3, 1024)
    with pytest.raises(MemoryError, match="too long"):
        split(batch_of([9, 5, 4]))
    assert running.acquire(blocking=False)
    assert running.acquire(blocking=False)
    assert torch.equal(split(batch_of([5, 4, 3])), sums(batch_of([5, 4, 3]))), "it still works after an error"


def test_threads_end_when_their_forward_pass_is_freed() -> None:
    before = own_threads()
    split = SplitForward(sums, 4, 1024)
    assert not own_threads() - before, "no thread is started before the first batch"
    split(batch_of([4, 5, 6, 7]))
    threads = own_threads() - before
    assert len(threads) == 4
    del split
    gc.collect()
    assert not any(thread.is_alive() for thread in threads), "no thread is left for interpreter exit"
