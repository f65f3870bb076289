"""Fused kernels, CUDA graphs, pinned copies and float8 on a real CUDA device."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.config import EMBEDDED_MODEL, DType
from bge_rerank_integrations.engine.attention import CANDIDATES, Candidate, name_of, resolve_attention
from bge_rerank_integrations.engine.attention_trial import try_attention
from bge_rerank_integrations.engine.checkpoint.locate import EMBEDDED_FOLDER
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda.float8 import check_float8
from bge_rerank_integrations.engine.cuda.fused_ops import FusedBlocks, FusedOps, resolve_fused
from bge_rerank_integrations.engine.cuda.graphs import CudaCapture, Graphs, Times, plan_buckets
from bge_rerank_integrations.engine.cuda.transfer import PinnedTransfer
from bge_rerank_integrations.engine.describe import describe_machine
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import PackedBatch, pack
from bge_rerank_integrations.engine.runner import Runner, load_runner
from tests.support.engine import max_difference, plain_logits, random_ids, score_all
from tests.support.fused_ops import check_linear, check_quantizing, check_values
from tests.support.rankings import check_rankings_agree
from tests.support.tolerances import LOGIT_TOLERANCE
from tests.support.triples import TRIPLES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)
HALF: list[DType] = ["float16", "bfloat16"]


def has_float8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


needs_float8 = pytest.mark.skipif(not has_float8(), reason="needs a CUDA device of capability 8.9 or later")


def triton_ops(dtype: torch.dtype, widths: tuple[int, int] = (64, 128)) -> FusedOps:
    ops = resolve_fused(CUDA, dtype, widths, quantizing=has_float8())
    assert not ops.is_plain, ops.name
    return ops


def compiled_kernels() -> int:
    """Return the number of compiled variants of our Triton kernels."""
    from triton.runtime.jit import JITFunction

    from bge_rerank_integrations.engine.cuda import triton_attention, triton_kernels

    modules = triton_attention, triton_kernels
    kernels = {
        kernel for each in modules for kernel in vars(each).values() if isinstance(kernel, JITFunction)
    }
    assert kernels
    return sum(len(per_device[0]) for kernel in kernels for per_device in kernel.device_caches.values())


def cuda_model(folder: Path, dtype: torch.dtype, ops: FusedOps | None) -> Callable[[PackedBatch], Tensor]:
    shape = read_shape(folder)
    return PackedCrossEncoder(
        shape,
        load_weights(folder, shape, device=CUDA, dtype=dtype),
        attention=resolve_attention(CUDA, dtype, shape.head_dim),
        blocks=None if ops is None else FusedBlocks(ops),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [384, 768, 1000, 1024, 4096])
@pytest.mark.parametrize("num_rows", [1, 7, 1025])
def test_fused_kernels_match_float64(dtype: torch.dtype, width: int, num_rows: int) -> None:
    ops = triton_ops(dtype, (width, width))
    check_values(ops, dtype, num_rows, width, "cuda")
    if has_float8():
        check_quantizing(ops, dtype, num_rows, width, "cuda")


@needs_float8
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fused_quantizing_keeps_values_that_are_not_finite(value: float) -> None:
    x = torch.ones(2, 384, device=CUDA, dtype=torch.bfloat16)
    x[1, 3] = value
    codes, scales = triton_ops(torch.bfloat16).quantize(x)
    dequantized = codes.float() * scales
    assert dequantized[0].isfinite().all()
    assert not dequantized[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_layers_match_plain_layers_on_cuda(
    checkpoint: Path, plain_model: Any, dtype: torch.dtype
) -> None:
    sequences = random_ids([*range(1, 513, 7)], read_shape(checkpoint).vocab_size, seed=8)
    batch = pack(sequences, padding_idx=1, device=CUDA)
    fused = cuda_model(checkpoint, dtype, triton_ops(dtype))(batch).tolist()
    plain = cuda_model(checkpoint, dtype, None)(batch).tolist()
    truth = plain_logits(plain_model, sequences)
    # Both round. Each must be as near to the exact logits as the tolerance says, wherever the other one is.
    assert max_difference(plain, truth) <= LOGIT_TOLERANCE[dtype]
    assert max_difference(fused, truth) <= LOGIT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*HALF, pytest.param("float8", marks=needs_float8)])
def test_no_kernel_is_compiled_after_loading(checkpoint: Path, dtype: DType) -> None:
    shape = read_shape(checkpoint)
    config = ScorerConfig(device="cuda", dtype=dtype, capture_graphs=False)
    runner = load_runner(config, checkpoint, shape)
    before = compiled_kernels()
    assert before > 0
    for seed, count in enumerate([1, 2, 3, 16, 17, 64, 200]):
        lengths = np.random.default_rng(seed).integers(4, 513, count).tolist()
        score_all(runner, random_ids(lengths, shape.vocab_size, seed=seed))
    graphed = load_runner(replace(config, capture_graphs=True), checkpoint, shape)
    score_all(graphed, random_ids([5, 6, 7], shape.vocab_size))
    assert compiled_kernels() == before


@pytest.mark.parametrize("dtype", [*HALF, pytest.param("float8", marks=needs_float8)])
def test_logits_with_graphs_match_logits_without(checkpoint: Path, dtype: DType) -> None:
    shape = read_shape(checkpoint)
    config = ScorerConfig(device="cuda", dtype=dtype)
    graphed = load_runner(config, checkpoint, shape)
    eager = load_runner(replace(config, capture_graphs=False), checkpoint, shape)
    assert eager is not graphed
    assert eager._graphs is None
    graphs = graphed._graphs
    assert graphs is not None, "attention on this device cannot be captured"
    buckets = plan_buckets(512, eager.max_batch_tokens)
    assert graphs.num_captured >= sum(bucket.num_rows <= 4096 for bucket in buckets)
    tolerance = LOGIT_TOLERANCE[getattr(torch, {"float8": "float8_e4m3fn"}.get(dtype, dtype))]
    random = np.random.default_rng(0)
    for seed in range(60):
        lengths = random.integers(4, int(random.choice([8, 60, 513])), int(random.integers(1, 60))).tolist()
        sequences = random_ids(lengths, shape.vocab_size, seed=seed)
        assert max_difference(score_all(graphed, sequences), score_all(eager, sequences)) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: name_of(candidate.attention))
def test_attention_that_fits_this_device_is_right(candidate: Candidate, dtype: torch.dtype) -> None:
    if not candidate.fits(CUDA, dtype, 64):
        pytest.skip("needs another device, precision or package")
    try_attention(candidate.attention, CUDA, dtype, 64, works_in_graphs=candidate.works_in_graphs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 100, 1025])
def test_the_fused_up_projection_matches_float64(dtype: torch.dtype, num_rows: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a CUDA device of capability 9.0 or later")
    from bge_rerank_integrations.engine.cuda.triton_kernels import linear_gelu

    for width, inner in ((384, 1536), (1000, 1000), (1024, 4096)):
        check_linear(linear_gelu, dtype, num_rows, width, inner, "cuda")


@pytest.mark.parametrize("dtype", HALF)
def test_scores_on_cuda_do_not_depend_on_the_batch_or_other_threads(
    checkpoint: Path, texts: list[str], dtype: DType
) -> None:
    tolerance = LOGIT_TOLERANCE[getattr(torch, dtype)]
    shuffled = random.Random(0)
    calls = [[(query, passage) for passage in shuffled.sample(texts, 20)] for query in texts[:24]]
    with Scorer(checkpoint, device="cuda", dtype=dtype) as scorer:
        serial = [scorer.score(call) for call in calls]
        alone = [[scorer.score([pair])[0] for pair in call] for call in calls[:3]]
        together = scorer.score([pair for call in calls for pair in call])
        in_reverse = [scorer.score(call[::-1])[::-1] for call in calls]
        with ThreadPoolExecutor(12) as pool:
            concurrent = list(pool.map(scorer.score, calls * 5))
    for call_number, expected in enumerate(serial):
        start = 20 * call_number
        for ours in (
            together[start : start + 20],
            in_reverse[call_number],
            *concurrent[call_number :: len(calls)],
            *alone[call_number : call_number + 1],
        ):
            assert max_difference(ours, expected) <= tolerance


EXIT_DURING_CALLS = """
    import sys, threading, time
    from bge_rerank_integrations import Scorer

    scorer = Scorer(sys.argv[1], device="cuda")
    pairs = [("a question", f"{number} " * 400) for number in range(50_000)]
    threading.Thread(target=scorer.score, args=(pairs,), daemon=True).start()
    while scorer.stats().waiting.p50_ms == 0.0:  # until the first batch has begun
        time.sleep(0.01)
    time.sleep(0.2)
"""


def test_a_process_that_ends_during_a_call_on_cuda_exits_cleanly(checkpoint: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXIT_DURING_CALLS), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, "")


def test_auto_takes_cuda_in_float16() -> None:
    report = describe_machine(ScorerConfig())
    assert (report.device, report.dtype) == ("cuda:0", "float16")
    assert report.max_graph_tokens > 0


def test_a_failed_capture_leaves_the_device_and_the_stream_usable(checkpoint: Path) -> None:
    model = cuda_model(checkpoint, torch.float16, None)
    stream = torch.cuda.current_stream()

    def forward(batch: PackedBatch) -> Tensor:
        logits = model(batch)
        if torch.cuda.is_current_stream_capturing():
            logits.tolist()  # a capture does not permit waiting for the device
        return logits

    graphs = Graphs(
        forward,
        device=CUDA,
        padding_idx=1,
        buckets=plan_buckets(512, 300),
        capture=CudaCapture(CUDA),
        measure=lambda _: Times(1.0, 1.0),
    )
    runner = Runner(forward, device=CUDA, padding_idx=1, max_batch_tokens=300, graphs=graphs)
    sequences = random_ids([20, 30], read_shape(checkpoint).vocab_size)
    expected = score_all(runner, sequences)
    graphs.capture()
    assert graphs.num_captured == 0
    assert torch.cuda.current_stream() == stream
    torch.randn(3, device=CUDA)  # the default generator works
    assert score_all(runner, sequences) == expected


def test_pinned_copies_give_the_same_logits_as_plain_copies(checkpoint: Path) -> None:
    """Also with buffers that are reused, and with batches that are larger than the buffers."""
    vocab_size = read_shape(checkpoint).vocab_size
    model = cuda_model(checkpoint, torch.float16, None)
    plain = Runner(model, device=CUDA, padding_idx=1, max_batch_tokens=600)
    transfer = PinnedTransfer(CUDA, 600)
    pinned = Runner(model, device=CUDA, padding_idx=1, max_batch_tokens=600, transfer=transfer)
    small = Runner(
        model, device=CUDA, padding_idx=1, max_batch_tokens=600, transfer=PinnedTransfer(CUDA, 100)
    )
    sequences = random_ids(np.random.default_rng(0).integers(4, 513, 300).tolist(), vocab_size)
    expected = score_all(plain, sequences)
    assert score_all(pinned, sequences) == expected
    assert score_all(small, sequences) == expected


@pytest.fixture
def little_memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    limit = (torch.cuda.memory_allocated() + (96 << 20)) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_on_cuda_splits_batches(checkpoint: Path, little_memory: None) -> None:
    vocab_size = read_shape(checkpoint).vocab_size
    model = cuda_model(checkpoint, torch.float16, None)
    transfer = PinnedTransfer(CUDA, 600)
    sequences = random_ids([500] * 400, vocab_size)
    expected = score_all(Runner(model, device=CUDA, padding_idx=1, max_batch_tokens=2000), sequences)
    runner = Runner(model, device=CUDA, padding_idx=1, max_batch_tokens=200_000, transfer=transfer)
    assert max_difference(score_all(runner, sequences), expected) <= LOGIT_TOLERANCE[torch.float16]
    assert runner.num_splits > 0


@needs_float8
def test_float8_works_on_this_device() -> None:
    for widths in ((384, 1536), (768, 3072), (1024, 4096)):
        check_float8(CUDA, widths)


@needs_float8
def test_float8_ranks_answers_above_distractors() -> None:
    passages = [passage for _, relevant, distractor in TRIPLES for passage in (relevant, distractor)]
    with (
        Scorer(EMBEDDED_MODEL, device="cpu", dtype="float32") as exact,
        Scorer(EMBEDDED_MODEL, device="cuda", dtype="float8") as coarse,
    ):
        coarse.warmup()
        for query, relevant, distractor in TRIPLES:
            assert coarse.rank(query, [distractor, relevant])[0].index == 1, query
        pairs = [(query, passage) for query, _, _ in TRIPLES for passage in passages]
        ours, theirs = coarse.score(pairs), exact.score(pairs)
    taus = [
        kendalltau(ours[start : start + len(passages)], theirs[start : start + len(passages)]).statistic
        for start in range(0, len(pairs), len(passages))
    ]
    print(f"Kendall's tau-b with float32: mean {np.mean(taus):.4f}, least {min(taus):.4f}")
    # Nearly all passages are irrelevant to the query, so their scores lie close together.
    assert np.mean(taus) >= 0.88


@needs_float8
def test_float8_on_cuda_keeps_the_ranking_of_the_embedded_model() -> None:
    shape = read_shape(EMBEDDED_FOLDER)
    exact = load_runner(ScorerConfig(device="cuda", dtype="float32"), EMBEDDED_FOLDER, shape)
    rounded = load_runner(ScorerConfig(device="cuda", dtype="float8"), EMBEDDED_FOLDER, shape)
    check_rankings_agree(exact, rounded, min_tau=0.96, max_ndcg_difference=0.005)


@needs_float8
def test_float8_weights_take_about_half_the_memory() -> None:
    config = ScorerConfig(model=EMBEDDED_MODEL, device="cuda", dtype="bfloat16")
    shape = read_shape(EMBEDDED_FOLDER)
    sizes = []
    for dtype in ("bfloat16", "float8"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        runner = load_runner(
            ScorerConfig.from_dict({**config.to_dict(), "dtype": dtype}), EMBEDDED_FOLDER, shape
        )
        sizes.append(torch.cuda.memory_allocated() - before)
        del runner
    matrices = sum(
        2 * rows[0] * rows[1]
        for name, rows in shape.parameter_shapes().items()
        if ".layer." in name and len(rows) == 2
    )
    assert sizes[0] - sizes[1] > 0.4 * matrices
