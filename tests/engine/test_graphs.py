"""Small batches padded to fixed shapes, with a fake capture, since a real one needs a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.attention import flash_attention, sdpa_attention
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda.graphs import (
    MAX_ROWS,
    Bucket,
    Capture,
    Graphs,
    Replay,
    can_capture,
    fill_up,
    plan_buckets,
)
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import PackedBatch, Seqlens, pack
from bge_rerank_integrations.engine.runner import Runner
from tests.support.engine import CPU, IntArray, max_difference, random_ids, score_all
from tests.support.tolerances import LOGIT_TOLERANCE

BUCKETS = plan_buckets(max_length=512, max_batch_tokens=1000)


def bounds_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Attention that reads only `cu_seqlens` and `max_seqlen`, as the varlen kernel does.

    Rows outside all sequences, and rows of sequences longer than `max_seqlen`, stay NaN.
    """
    output = torch.full_like(q, float("nan"))
    q_bounds, kv_bounds = q_seqlens.cu_seqlens.tolist(), kv_seqlens.cu_seqlens.tolist()
    for i in range(len(q_bounds) - 1):
        rows, columns = slice(q_bounds[i], q_bounds[i + 1]), slice(kv_bounds[i], kv_bounds[i + 1])
        if kv_bounds[i] == kv_bounds[i + 1]:
            output[rows] = 0
        elif kv_bounds[i + 1] - kv_bounds[i] <= kv_seqlens.max_seqlen:
            query, key, value = (part.transpose(0, 1) for part in (q[rows], k[columns], v[columns]))
            output[rows] = F.scaled_dot_product_attention(query, key, value).transpose(0, 1)
    return output


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


def graphs_of(
    forward: Callable[[PackedBatch], Tensor], capture: Capture, buckets: list[Bucket] | None = None
) -> Graphs:
    return Graphs(
        forward, device=CPU, padding_idx=1, buckets=BUCKETS if buckets is None else buckets, capture=capture
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
    assert recorded.num_captured == recorded.num_replayed == 0, "only a warm-up captures graphs"
    runner.warmup()
    before = recorded.num_replayed
    assert max_difference(score_all(runner, small), expected) <= LOGIT_TOLERANCE[torch.float32]
    assert recorded.num_replayed == before + 1
    score_all(runner, large)
    assert recorded.num_replayed == before + 1
    runner.warmup()
    assert recorded.num_captured == len(plan_buckets(512, 200)), "the second warm-up captures nothing"


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("not permitted")]
)
def test_a_failed_capture_discards_all_graphs_and_is_logged_once(
    model: PackedCrossEncoder, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded()

    def capture(function: Callable[[], Tensor]) -> Replay:
        if recorded.num_captured == 2:
            raise error
        return recorded(function)

    graphs = graphs_of(model, capture)
    runner = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=600, graphs=graphs)
    expected = score_all(runner, random_ids([20, 30], 100))
    runner.warmup()
    runner.warmup()
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


def test_only_flash_attention_on_cuda_can_be_captured() -> None:
    assert can_capture(torch.device("cuda"), flash_attention)
    assert not can_capture(torch.device("cuda"), sdpa_attention)
    assert not can_capture(CPU, flash_attention)
