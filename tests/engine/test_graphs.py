"""Small batches padded to fixed shapes, with a fake capture, since a real one needs a CUDA device."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine import build
from bge_rerank_integrations.engine.attention import (
    VarlenAttention,
    efficient_attention,
    flash_attention,
    flash_attention_3,
    triton_attention,
    varlen_attention,
)
from bge_rerank_integrations.engine.attention_by_length import sdpa_attention
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda.graphs import (
    MAX_ROWS,
    Bucket,
    Capture,
    CudaCapture,
    Graphs,
    Replay,
    Times,
    can_capture,
    fill_up,
    measure_launch,
    plan_buckets,
)
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import PackedBatch, pack
from bge_rerank_integrations.engine.runner import Runner
from tests.support.attention import WHOLE_BATCH, bounds_attention, cuda_operators_on_cpu
from tests.support.engine import CPU, IntArray, max_difference, random_ids, score_all
from tests.support.tolerances import LOGIT_TOLERANCE

BUCKETS = plan_buckets(max_length=512, max_batch_tokens=1000)


class Recorded:
    """Acts like a graph: runs the function again on the same buffers, and writes to the same output."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        output = function().clone()
        self.num_captured += 1

        def replay() -> Tensor:
            self.num_replayed += 1
            return output.copy_(function())

        return replay


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PackedCrossEncoder:
    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
    return PackedCrossEncoder(shape, weights, attention=bounds_attention)


def slow_launch(function: Callable[[], object]) -> Times:
    """The device is done as soon as the host has launched everything."""
    function()
    return Times(1.0, 1.0)


def graphs_of(
    forward: Callable[[PackedBatch], Tensor],
    capture: Capture,
    buckets: list[Bucket] | None = None,
    measure: Callable[[Callable[[], object]], Times] = slow_launch,
) -> Graphs:
    return Graphs(
        forward,
        device=CPU,
        padding_idx=1,
        buckets=BUCKETS if buckets is None else buckets,
        capture=capture,
        measure=measure,
    )


def random_batch(random: np.random.Generator) -> list[IntArray]:
    longest = int(random.choice([5, 60, 200, 512]))
    lengths = random.integers(4, longest + 1, int(random.integers(1, 40)))
    lengths = lengths[np.cumsum(lengths) <= 1000]
    return random_ids(lengths.tolist() or [longest], 100, seed=int(random.integers(1 << 30)))


def test_replayed_logits_equal_eager_logits(model: PackedCrossEncoder) -> None:
    recorded = Recorded()
    graphs = graphs_of(model, recorded)
    graphs.capture()
    assert graphs.num_captured == recorded.num_captured == len(BUCKETS)
    runner = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=1000, graphs=graphs)
    before = recorded.num_replayed
    random = np.random.default_rng(0)
    num_batches = 25
    for _ in range(num_batches):
        sequences = random_batch(random)
        eager = model(pack(sequences, padding_idx=1, device=CPU)).tolist()
        assert max_difference(score_all(runner, sequences), eager) <= LOGIT_TOLERANCE[torch.float32]
    assert recorded.num_replayed - before > num_batches // 2, "most batches fit a bucket"


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 383, 384, 511, 512, 1000])
def test_padding_gives_every_row_a_sequence_and_every_sequence_a_row(num_tokens: int) -> None:
    lengths = [min(num_tokens, 512), num_tokens - 512][: 1 if num_tokens <= 512 else 2]
    sequences = random_ids(lengths, 100)
    graphs = graphs_of(lambda batch: torch.zeros(len(batch.seqlens.lengths)), Recorded())
    graphs.capture()
    padded = graphs.pad(sequences)
    bucket = next(bucket for bucket in BUCKETS if bucket.num_rows > num_tokens)
    assert all(ours is theirs for ours, theirs in zip(padded, sequences, strict=False)), (
        "the given sequences come first"
    )
    batch = pack(padded, padding_idx=1, device=CPU)
    assert (len(batch.ids), len(batch.seqlens.lengths)) == bucket[:2]
    assert batch.seqlens.max_seqlen <= bucket.max_seqlen
    bounds = batch.seqlens.cu_seqlens
    assert int(bounds[-1]) == bucket.num_rows
    assert int(bounds[:-1].max()) < bucket.num_rows, "every sequence starts at an existing row"
    assert (batch.ids[num_tokens:] == 1).all()
    assert int(batch.positions.max()) < 514


def test_a_batch_that_does_not_fit_a_bucket_is_not_padded() -> None:
    bucket = Bucket(num_rows=128, num_sequences=8, max_seqlen=100)
    assert fill_up(random_ids([101], 100), bucket, 1) is None, "the sequence is too long"
    assert fill_up(random_ids([5] * 8, 100), bucket, 1) is None, "there is no room for padding sequences"
    assert fill_up(random_ids([64, 64], 100), bucket, 1) is None, "there is no row for padding"
    assert fill_up(random_ids([5] * 7, 100), bucket, 1) is not None
    assert fill_up(random_ids([10], 100), bucket, 1) is not None


def test_large_batches_and_batches_before_the_capture_run_without_graphs(model: PackedCrossEncoder) -> None:
    recorded = Recorded()
    graphs = graphs_of(model, recorded, plan_buckets(512, 200))
    runner = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=600, graphs=graphs)
    small, large = random_ids([20, 30], 100), random_ids([256], 100)
    expected = score_all(runner, small)
    assert recorded.num_captured == recorded.num_replayed == 0, "only `capture` captures graphs"
    graphs.capture()
    before = recorded.num_replayed
    assert max_difference(score_all(runner, small), expected) <= LOGIT_TOLERANCE[torch.float32]
    assert recorded.num_replayed == before + 1
    score_all(runner, large)
    assert recorded.num_replayed == before + 1


def first_ids(batch: PackedBatch) -> Tensor:
    return batch.ids[batch.seqlens.cu_seqlens[:-1]].float()


@pytest.mark.parametrize("largest", [100, 4096, 4608, 12_288, 100_000])
def test_large_batches_have_graphs_only_if_launching_takes_at_least_half_the_time(
    largest: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The stand-in launches in a second, and computes `largest` rows in two."""
    recorded = Recorded()
    measured: list[int] = []
    rows: list[int] = []

    def forward(batch: PackedBatch) -> Tensor:
        rows.append(len(batch.ids))
        return first_ids(batch)

    def measure(function: Callable[[], object]) -> Times:
        function()
        measured.append(rows[-1])
        return Times(1.0, max(1.0, 2 * rows[-1] / largest))

    buckets = plan_buckets(512, 16_384)
    graphs = graphs_of(forward, recorded, buckets, measure)
    with caplog.at_level(logging.INFO, "bge_rerank_integrations"):
        graphs.capture()
    sizes = [bucket.num_rows for bucket in buckets if bucket.num_rows <= max(largest, 4096)]
    assert graphs.num_captured == recorded.num_captured == len(sizes)
    assert f"captured {len(sizes)} CUDA graphs for batches of up to {sizes[-1] - 1} tokens" in caplog.text
    assert min(measured) > 4096, "smaller batches have graphs on every device"
    for num_tokens in (100, 4000, 4200, 9000, 16_000):
        padded = graphs.pad(random_ids([100] * (num_tokens // 100), 100))
        fitting = [size for size in sizes if size > num_tokens]
        assert sum(map(len, padded)) == (fitting[0] if fitting else num_tokens)


@pytest.mark.parametrize("while_measuring", [True, False])
def test_batches_that_do_not_fit_into_memory_have_no_graphs(while_measuring: bool) -> None:
    recorded = Recorded()
    measuring = [False]

    def forward(batch: PackedBatch) -> Tensor:
        if len(batch.ids) > 6000 and measuring[0] == while_measuring:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return first_ids(batch)

    def measure(function: Callable[[], object]) -> Times:
        measuring[0] = True
        try:
            function()
        finally:
            measuring[0] = False
        return Times(1.0, 1.0)

    buckets = plan_buckets(512, 16_384)
    graphs = graphs_of(forward, recorded, buckets, measure)
    graphs.capture()
    assert graphs.num_captured == sum(bucket.num_rows <= 6000 for bucket in buckets)
    assert sum(map(len, graphs.pad(random_ids([500] * 10, 100)))) == 5120
    large = random_ids([500] * 13, 100)
    assert graphs.pad(large) is large


def test_the_time_of_a_launch_is_measured_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in launches in 1 s, and computes in 3 s. Its first call takes longer."""
    now, busy_until, calls = [0.0], [0.0], [0]

    def launch() -> None:
        assert now[0] >= busy_until[0], "idle"
        calls[0] += 1
        now[0] += 10.0 if calls[0] == 1 else 1.0
        busy_until[0] = now[0] + 2.0

    def synchronize() -> None:
        now[0] = max(now[0], busy_until[0])

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert measure_launch(launch) == Times(launch_s=1.0, total_s=3.0)


def test_a_failed_capture_discards_all_graphs_and_is_logged_once(
    model: PackedCrossEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    recorded, error = Recorded(), RuntimeError("not permitted")

    def capture(function: Callable[[], Tensor]) -> Replay:
        if recorded.num_captured == 2:
            raise error
        return recorded(function)

    graphs = graphs_of(model, capture)
    runner = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=600, graphs=graphs)
    expected = score_all(runner, random_ids([20, 30], 100))
    graphs.capture()
    assert graphs.num_captured == 0
    assert caplog.text.count("CUDA graphs are disabled") == 1
    assert str(error) in caplog.text
    replayed = recorded.num_replayed
    assert score_all(runner, random_ids([20, 30], 100)) == expected
    assert recorded.num_replayed == replayed


def test_a_graph_that_does_not_read_its_buffers_is_detected(
    model: PackedCrossEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(function: Callable[[], Tensor]) -> Replay:
        output = function() + 1
        return lambda: output

    graphs = graphs_of(model, stale)
    graphs.capture()
    assert graphs.num_captured == 0
    assert "AssertionError" in caplog.text


def test_buckets_add_little_padding_and_reach_the_limit() -> None:
    buckets = plan_buckets(max_length=512, max_batch_tokens=10**6)
    sizes = [bucket.num_rows for bucket in buckets]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == MAX_ROWS
    assert all(after <= max(1.25 * before, before + 128) for before, after in pairwise(sizes))
    assert all(bucket.max_seqlen <= min(512, bucket.num_rows) for bucket in buckets)
    assert plan_buckets(512, 100)[-1].num_rows == 128
    assert plan_buckets(512, 128)[-1].num_rows == 256, "a full batch has a bucket too"


@pytest.mark.parametrize("max_length", [24, 50, 64, 65, 512, 8192])
def test_every_bucket_has_room_for_two_sequences_beside_its_padding(max_length: int) -> None:
    buckets = plan_buckets(max_length, 16_384)
    assert buckets
    for bucket in buckets:
        assert fill_up(random_ids([5, 3], 100), bucket, 1) is not None
    assert (buckets[-1].num_rows == MAX_ROWS) == (max_length >= 65)


def test_a_bucket_has_no_sequence_of_more_than_512_tokens() -> None:
    """Attention launches a block for each part of the longest sequence, for every sequence of a bucket."""
    assert {bucket.max_seqlen for bucket in plan_buckets(8192, 16384)} == {128, 256, 384, 512}


def test_longer_sequences_run_without_graphs(model: PackedCrossEncoder) -> None:
    recorded = Recorded()
    graphs = graphs_of(first_ids, recorded)
    graphs.capture()
    before = recorded.num_replayed
    runner = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=1000, graphs=graphs)
    score_all(runner, random_ids([600], 100))
    assert recorded.num_replayed == before
    score_all(runner, random_ids([500], 100))
    assert recorded.num_replayed == before + 1


@pytest.mark.parametrize(
    "attention",
    [flash_attention_3, triton_attention, flash_attention, varlen_attention, efficient_attention],
)
def test_attention_that_reads_only_tensors_can_be_captured_on_cuda(attention: VarlenAttention) -> None:
    assert can_capture(torch.device("cuda"), attention)
    assert not can_capture(torch.device("cuda"), sdpa_attention)
    assert not can_capture(CPU, attention)


@pytest.mark.parametrize("attention", WHOLE_BATCH)
def test_graphs_with_kernels_for_whole_batches(checkpoint: Path, attention: VarlenAttention) -> None:
    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
    model = PackedCrossEncoder(shape, weights, attention=attention)
    recorded = Recorded()
    graphs = graphs_of(model, recorded, plan_buckets(512, 200))
    sequences = random_ids([20, 30, 30], 100)
    with cuda_operators_on_cpu():
        graphs.capture()
        assert graphs.num_captured == 2
        before = recorded.num_replayed
        runner = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=200, graphs=graphs)
        replayed = score_all(runner, sequences)
        eager = model(pack(sequences, padding_idx=1, device=CPU)).tolist()
    assert recorded.num_replayed == before + 1
    assert max_difference(replayed, eager) <= LOGIT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("capture_graphs", [True, False])
def test_graphs_are_captured_while_the_model_loads(
    checkpoint: Path, capture_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded()

    def graphs_on_cpu(forward: Callable[[PackedBatch], Tensor], *_: object) -> Graphs:
        return graphs_of(forward, recorded, plan_buckets(512, 200))

    monkeypatch.setattr(build, "resolve_graphs", graphs_on_cpu)
    monkeypatch.setattr(build, "resolve_attention", lambda *_: bounds_attention)
    config = ScorerConfig(device="cpu", capture_graphs=capture_graphs)
    spec = build.ModelSpec(checkpoint, read_shape(checkpoint), config, CPU, torch.float32, 200)
    model = build.build_model(spec)
    assert (model.graphs is not None) is capture_graphs
    assert recorded.num_captured == (2 if capture_graphs else 0)


class FakeGraph:
    """A graph without work."""

    def replay(self) -> None:
        pass


class Machine:
    """A stand-in for the parts of `torch.cuda` that capture graphs, with the generator of torch 2.10.

    There, a capture marks the default generator, and only a capture that ends without an error removes the mark.

    Attributes:
        existing: The graphs that are not destroyed yet.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.existing: WeakSet[FakeGraph] = WeakSet()
        self.is_capturing = False
        self.generator_is_marked = False
        self.is_invalid = False
        self.released: list[str] = []
        self.num_graphs = 0
        for name, value in {
            "device": lambda _: nullcontext(),
            "current_device": lambda: 0,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": SimpleNamespace,
            "stream": lambda _: nullcontext(),
            "CUDAGraph": self.new_graph,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(
                torch._C, name, lambda *_, name=name: self.released.append(name), raising=False
            )

    def new_graph(self) -> FakeGraph:
        graph = FakeGraph()
        self.existing.add(graph)
        return graph

    @contextmanager
    def graph(self, graph: object, **options: object) -> Iterator[None]:
        self.is_capturing = self.generator_is_marked = True
        self.is_invalid = False
        try:
            yield
        finally:
            self.is_capturing = False
            if self.is_invalid:
                raise RuntimeError("operation failed due to a previous error during capture")
        self.num_graphs += 1
        self.generator_is_marked = False

    def random(self) -> None:
        if self.generator_is_marked:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


@pytest.mark.parametrize("ends_with_an_error", [False, True])
def test_a_failed_capture_leaves_the_default_generator_usable(
    ends_with_an_error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    capture = CudaCapture(CPU)
    calls: list[None] = []

    def function() -> Tensor:
        calls.append(None)
        if len(calls) == 2:  # the first call is not captured
            machine.is_invalid = True
            if not ends_with_an_error:
                raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="operation failed due to a previous error"):
        capture(function)
    machine.random()
    assert machine.num_graphs == 1, "a graph that ended without an error"
    assert machine.released == ["_cuda_endAllocateToPool", "_cuda_releasePool"]
    capture(function)
    assert machine.num_graphs == 2


@pytest.mark.parametrize(
    ("failing_rows", "num_existing"),
    [
        (128, 2 + 1 + 1),  # with the graph that makes the generator usable
        (256, 2 + 1 + 1),
        (384, 2),  # the largest bucket is the first, so no other graph exists when its capture fails
    ],
)
def test_a_graph_whose_capture_failed_is_not_destroyed_before_the_others(
    failing_rows: int, num_existing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)

    def forward(batch: PackedBatch) -> Tensor:
        if machine.is_capturing and len(batch.ids) == failing_rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(len(batch.seqlens.lengths))

    graphs = graphs_of(forward, CudaCapture(CPU), plan_buckets(512, 300))
    graphs.capture()
    gc.collect()
    assert graphs.num_captured == 2
    assert len(machine.existing) == num_existing
    del graphs
    gc.collect()
    assert not machine.existing


def test_no_graph_is_destroyed_while_one_of_them_may_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    capture = CudaCapture(CPU)
    replays = [capture(lambda: torch.zeros(1)) for _ in range(3)]
    del capture
    while replays:
        gc.collect()
        assert len(machine.existing) == 3
        replays[0]()
        replays.pop()
    gc.collect()
    assert not machine.existing


def test_the_graphs_are_destroyed_if_one_capture_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)

    def forward(batch: PackedBatch) -> Tensor:
        if machine.is_capturing and len(batch.ids) == 256:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(len(batch.seqlens.lengths))

    graphs = graphs_of(forward, CudaCapture(CPU), plan_buckets(512, 300))
    graphs.capture()
    gc.collect()
    assert graphs.num_captured == 0
    assert not machine.existing, "their memory is free"
