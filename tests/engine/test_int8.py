"""int8 on CPUs: each kernel compared with float arithmetic, and the model with float32."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.locate import EMBEDDED_FOLDER
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cpu import int8_support
from bge_rerank_integrations.engine.cpu.int8_support import has_onednn_products, int8_obstacle
from bge_rerank_integrations.engine.cpu.thread_count import call_with_threads
from bge_rerank_integrations.engine.cpu.vector_support import PAIRS_STEP
from bge_rerank_integrations.engine.describe import describe_machine, describe_precision
from bge_rerank_integrations.engine.runner import load_runner
from bge_rerank_integrations.errors import ConfigError, UnsupportedCheckpointError
from examples.random_checkpoint import build_random_checkpoint
from tests.support.attention import HAS_PAIRS, needs_pairs
from tests.support.engine import max_difference, random_ids, score_all
from tests.support.rankings import check_rankings_agree
from tests.support.threads import refuse_to_start
from tests.support.tolerances import LOGIT_TOLERANCE

REASON = int8_obstacle()
needs_int8 = pytest.mark.skipif(REASON is not None, reason=f"int8 is not available: {REASON}")
Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Floats:
    return (RNG.standard_normal(shape) * scale + shift).astype(np.float32)


def room(num_rows: int, width: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    return np.empty((num_rows, width), np.uint8), np.empty((num_rows, 2), np.float32)


def check_codes(values: Floats, codes: npt.NDArray[np.uint8], affine: Floats) -> None:
    """Every value is within half a step, and the extremes of a row have the codes 0 and 255."""
    restored = affine[:, :1] * codes + affine[:, 1:]
    assert (np.abs(restored - values) <= affine[:, :1] * 0.5001 + 1e-6).all()
    varied = affine[:, 0] > 0
    assert (codes[varied].min(1) == 0).all()
    assert (codes[varied].max(1) == 255).all()


@needs_int8
@pytest.mark.parametrize("width", [16, 100, 384, 768])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_quantizing_is_accurate_to_half_a_step(width: int, shift: float) -> None:
    from bge_rerank_integrations.engine.cpu.int8_kernels import quantize

    x = normal(9, width, scale=2.0, shift=shift)
    x[3] = 0.25  # a row of one value
    x[4, 5] = 1000.0
    codes, affine = room(*x.shape)
    quantize(x, codes, affine)
    check_codes(x, codes, affine)
    assert (affine[3, 0] * codes[3] + affine[3, 1] == 0.25).all()


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"),
    reason="needs a torch built with oneDNN",
)
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_onednn_is_tried_with_the_same_scales_whatever_the_default_dtype_is(default: torch.dtype) -> None:
    """It refuses others, and int8 would then be slower or not available."""
    seen: list[torch.dtype] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.onednn.qlinear_pointwise.default:
                seen.append(args[4].dtype)
            return func(*args, **(kwargs or {}))

    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with Recording():  # type: ignore[no-untyped-call]
            int8_support._multiplies_correctly()
    finally:
        torch.set_default_dtype(before)
    assert seen == [torch.float32]


@needs_int8
@pytest.mark.parametrize("width", [48, 1536])
def test_gelu_quantize_matches_torch(width: int) -> None:
    from bge_rerank_integrations.engine.cpu.int8_kernels import gelu_quantize

    product, affine = normal(7, width, scale=3.0), np.abs(normal(7, 2)) + 0.1
    offset, bias = normal(width), normal(width)
    whole = affine[:, :1] * product + affine[:, 1:] * offset + bias
    expected = F.gelu(torch.from_numpy(whole)).numpy()
    codes, out_affine = room(7, width)
    gelu_quantize(product, affine, offset, bias, codes, out_affine)
    assert np.abs(product - expected).max() <= 2e-6 * np.abs(expected).max(), "the result is written in place"
    check_codes(product, codes, out_affine)


@needs_int8
@pytest.mark.parametrize("width", [48, 384])
def test_add_norm_quantize_matches_torch(width: int) -> None:
    from bge_rerank_integrations.engine.cpu.int8_kernels import add_norm_quantize

    product, affine = normal(7, width), np.abs(normal(7, 2)) + 0.1
    offset, bias, weight, shift = (normal(width) for _ in range(4))
    x = normal(7, width, shift=3.0)
    whole = torch.from_numpy(x + affine[:, :1] * product + affine[:, 1:] * offset + bias)
    expected = F.layer_norm(whole, (width,), torch.from_numpy(weight), torch.from_numpy(shift), 1e-5).numpy()
    codes, out_affine = room(7, width)
    add_norm_quantize(product, affine, offset, bias, x, weight, shift, 1e-5, codes, out_affine)
    assert np.abs(x - expected).max() <= 1e-5
    check_codes(x, codes, out_affine)


@needs_int8
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 6, 7], [16, 17, 33], [70, 130], [90, 110], [512]])
def test_int8_attention_matches_torch(head_dim: int, lengths: list[int]) -> None:
    from bge_rerank_integrations.engine.cpu.int8_attention import attend

    num_heads, num_rows = 3, sum(lengths)
    width = num_heads * head_dim
    product, affine = normal(num_rows, 3 * width, scale=2.0), np.abs(normal(num_rows, 2)) + 0.1
    offset, bias = normal(3 * width), normal(3 * width)
    whole = torch.from_numpy(affine[:, :1] * product + affine[:, 1:] * offset + bias)
    in_pairs = HAS_PAIRS and head_dim % PAIRS_STEP == 0
    if in_pairs:  # then the kernel rounds what it multiplies, and also the weights of the softmax
        whole = whole.bfloat16()
    q, k, v = whole.view(num_rows, 3, num_heads, head_dim).double().unbind(1)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in parts)).transpose(0, 1)
            for parts in zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
        ]
    ).flatten(1)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    weights = (product, affine, offset, bias, cu_seqlens)
    attended = np.empty((num_rows, width), np.float32)
    codes, out_affine = room(num_rows, width)
    attend(*weights, *weights, width, num_heads, attended, codes, out_affine)
    tolerance = 4e-3 if in_pairs else 1e-5
    assert np.abs(attended - expected.numpy()).max() <= tolerance * np.abs(expected.numpy()).max()
    check_codes(attended, codes, out_affine)

    firsts = cu_seqlens[:-1]
    queries = np.ascontiguousarray(product[firsts, :width])
    positions = np.arange(len(lengths) + 1, dtype=np.int32)
    first = np.empty((len(lengths), width), np.float32)
    attend(
        queries, affine[firsts], offset[:width], bias[:width], positions,
        *weights, width, num_heads, first, *room(len(lengths), width),
    )  # fmt: skip
    assert np.abs(first - attended[firsts]).max() <= 1e-6


@needs_pairs
def test_int8_is_right_without_pairs_of_bfloat16() -> None:
    names = ["test_int8_attention_matches_torch", "test_int8_logits_are_near_float32"]
    tests = [f"{__file__}::{name}" for name in names]
    code = (
        "import sys, pytest; from bge_rerank_integrations.engine.cpu.compiler import HAS_PAIRS; "
        "sys.exit(HAS_PAIRS or pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *tests],
        capture_output=True,
        text=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^38 passed(, \d+ warnings)? in ", run.stdout, re.MULTILINE), run.stdout


@needs_pairs
@pytest.mark.parametrize(
    "setting",
    [
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_CPU_FEATURES": "+avx2"},
        {"NUMBA_ENABLE_AVX": "0"},
    ],
)
def test_settings_that_exclude_the_instructions_are_followed(setting: dict[str, str]) -> None:
    """LLVM would end the process if it met an instruction that it may not use."""
    code = "from bge_rerank_integrations.engine.cpu.compiler import HAS_PAIRS; print(HAS_PAIRS)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **setting},
    )
    assert run.stdout == "False\n"


def test_int8_works_or_is_refused_if_numba_may_not_use_avx() -> None:
    code = (
        "from bge_rerank_integrations import Scorer\n"
        "with Scorer('embedded', device='cpu', dtype='int8') as scorer: print(scorer.score([('a', 'b')]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_ENABLE_AVX": "0"},
    )
    if has_onednn_products():
        assert run.returncode == 0, run.stderr
    else:
        assert "DeviceError: dtype 'int8' is not available" in run.stderr


@needs_pairs
def test_pairs_are_rounded_like_torch() -> None:
    import numba

    from bge_rerank_integrations.engine.cpu import bfloat16_pairs

    row: Any = bfloat16_pairs.pack_row
    columns: Any = bfloat16_pairs.pack_columns
    compiled: Any = numba.njit
    pack_row = compiled(lambda a, start, b, b_start, count: row(a, start, b, b_start, count))
    pack_columns = compiled(
        lambda a, first, second, b, start, count: columns(a, first, second, b, start, count)
    )
    bits_of_columns: Any = bfloat16_pairs.pair_columns
    pair_columns = compiled(
        lambda a, first, second, b, start, count: bits_of_columns(a, first, second, b, start, count)
    )
    bits = normal(64).view(np.uint32)
    bits[:6] = 0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7FC00000  # ties, infinities, NaN
    rows = bits.view(np.float32)
    rounded = torch.from_numpy(rows).bfloat16()

    def check(pairs: Floats, expected: torch.Tensor) -> None:
        values = torch.from_numpy(pairs).view(torch.bfloat16)
        assert values[expected.isnan()].isnan().all()
        known = ~expected.isnan()
        assert torch.equal(values[known].view(torch.int16), expected[known].view(torch.int16))

    by_row = np.empty(32, np.float32)
    pack_row(rows, 0, by_row, 0, 64)
    check(by_row, rounded)
    by_column = np.empty(32, np.float32)
    pack_columns(rows, 0, 32, by_column, 0, 32)
    check(by_column, rounded.view(2, 32).T.flatten())
    pair_columns(rounded.view(torch.int16).numpy().view(np.uint16), 0, 32, by_column, 0, 32)
    check(by_column, rounded.view(2, 32).T.flatten())
    in_place = rows.copy()
    pack_row(in_place, 0, in_place, 0, 64)
    check(in_place[:32], rounded)


@needs_int8
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 100, 112])
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1e5])
@pytest.mark.parametrize("factor", [1.0, 1.4426950408889634 / 8])
def test_powers_of_2_match_numpy(length: int, shift: float, factor: float) -> None:
    import numba

    from bge_rerank_integrations.engine.cpu import vector_intrinsics

    powers: Any = vector_intrinsics.powers_of_2
    compiled: Any = numba.njit
    take = compiled(lambda row, start, length, factor: powers(row, start, length, factor))
    row, factor = normal(140, scale=8.0, shift=shift), float(np.float32(factor))
    row[4:8] = row[4], row[4] - 2000, -3e38, row[4]
    before, end = row.copy(), 3 + length
    row[end : end + 2] = np.nan, 3e38  # they are not in the row, and must not count
    total = take(row, 3, length, np.float32(factor))
    above = factor * (before[3:end] - before[3:end].max()).astype(np.float64)
    expected = np.exp2(np.maximum(above, -125))
    np.testing.assert_allclose(row[3:end], expected, rtol=4e-6)
    np.testing.assert_allclose(total, expected.sum(), rtol=4e-6)
    assert (row[3:end] >= np.finfo(np.float32).tiny).all()  # denormal floats would be slow
    padded = 3 + -(-length // 32) * 32
    assert (row[end:padded] == 0).all()
    assert (row[:3] == before[:3]).all()
    assert (row[max(padded, end + 2) :] == before[max(padded, end + 2) :]).all()


@needs_int8
def test_widest_vectors_sets_the_attribute_for_llvm() -> None:
    import numba

    from bge_rerank_integrations.engine.cpu import vector_intrinsics

    widest_vectors: Any = vector_intrinsics.widest_vectors
    compiled: Any = numba.njit

    def twice(x: Floats) -> None:
        widest_vectors()
        for i in range(x.shape[0]):
            x[i] *= 2

    double = compiled(twice)
    x = normal(100)
    expected = 2 * x
    double(x)
    assert (x == expected).all()
    assert any('"prefer-vector-width"="512"' in text for text in double.inspect_llvm().values())


def products() -> list[Any]:
    """Return the implementations of products that this machine can run."""
    if REASON is not None:
        return []
    from bge_rerank_integrations.engine.cpu.compiler import HAS_AVX2
    from bge_rerank_integrations.engine.cpu.int8_linear import int16_product, onednn_product

    return [onednn_product] * has_onednn_products() + [int16_product] * HAS_AVX2


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the number of threads that share an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = [(1, 64, 32), (1, 1, 1), (16, 384, 1536), (130, 100, 7), (7, 33, 50), (400, 1024, 17), (3, 4097, 16)]


@needs_int8
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize("make_product", products())
@pytest.mark.usefixtures("num_threads")
def test_int8_products_are_exact(make_product: Any, rows: int, width: int, out: int) -> None:
    weight = torch.from_numpy(RNG.integers(-127, 128, (out, width), dtype=np.int8))
    scale = torch.from_numpy(np.abs(normal(out)) + 0.1)
    codes = torch.from_numpy(RNG.integers(0, 256, (rows, width), dtype=np.uint8))
    codes[0] = 255  # the largest possible sums
    weight[0] = 127
    if out > 1:
        weight[1] = -127
    product = make_product(weight, scale)
    for _ in range(2):
        expected = (codes.double() @ weight.double().T) * scale.double()
        np.testing.assert_allclose(product(codes), expected.numpy(), rtol=1e-6, atol=1e-5)
        codes = codes.flip(0)[: max(1, rows // 2)].contiguous()


@needs_int8
def test_int8_weights_are_quantized_by_channel() -> None:
    from bge_rerank_integrations.engine.cpu.int8_linear import Int8Linear

    weight, bias = torch.from_numpy(normal(7, 100)), torch.from_numpy(normal(7))
    weight[0] = 0  # a channel of zeros
    linear = Int8Linear(weight.clone(), bias)
    codes = torch.from_numpy(RNG.integers(0, 256, (130, 100), dtype=np.uint8))
    scale = weight.abs().amax(1).clamp_min(1e-30) / 127
    integers = (weight / scale[:, None]).round()
    expected = (codes.double() @ integers.double().T) * scale.double()
    np.testing.assert_allclose(linear.product(codes), expected.numpy(), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(linear.offset, (integers.sum(1) * scale).numpy(), rtol=1e-5, atol=1e-5)
    assert (linear.bias == bias.numpy()).all()


@needs_int8
def test_an_error_in_any_share_of_the_work_reaches_the_caller(num_threads: int) -> None:
    from bge_rerank_integrations.engine.cpu.shared_work import share

    for failing in range(num_threads):
        done: list[range] = []

        def work(start: int, end: int, failing: int = failing, done: list[range] = done) -> None:
            if start <= failing * 7 // num_threads < end:
                raise ValueError("no")
            done.append(range(start, end))

        with pytest.raises(ValueError, match="no"):
            share(work, 7)
        assert len(done) == num_threads - 1, "all other shares have ended"


@needs_int8
@pytest.mark.parametrize("num_items", [0, 1, 2, 7])
@pytest.mark.usefixtures("num_threads")
def test_each_item_is_in_one_share(num_items: int) -> None:
    from bge_rerank_integrations.engine.cpu.shared_work import share

    done: list[int] = []
    share(lambda start, end: done.extend(range(start, end)), num_items)
    assert sorted(done) == [*range(num_items)]


@needs_int8
def test_a_part_is_computed_once_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor keeps a part that it cannot start a thread for."""
    from bge_rerank_integrations.engine.cpu import shared_work

    executor = ThreadPoolExecutor(2)
    is_free = threading.Event()
    executor.submit(is_free.wait)
    monkeypatch.setattr(shared_work, "_executor", executor)
    done: list[range] = []
    with monkeypatch.context() as patch:
        # The thread that keeps torch's number is started by `_thread`, so it is not refused.
        patch.setattr(threading.Thread, "start", refuse_to_start)
        call_with_threads(3, lambda: shared_work.share(lambda start, end: done.append(range(start, end)), 6))
    is_free.set()
    executor.shutdown()  # waits until the thread has taken what the executor has kept
    assert sorted(done, key=min) == [range(2), range(2, 4), range(4, 6)]


@needs_int8
def test_parts_that_no_thread_computes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from bge_rerank_integrations.engine.cpu import shared_work

    class Result:
        """Stands for the arrays of a product."""

    executor = ThreadPoolExecutor(1)
    monkeypatch.setattr(shared_work, "_executor", executor)
    monkeypatch.setattr(threading.Thread, "start", refuse_to_start)
    result = Result()

    def work(start: int, end: int, _: Result = result) -> None:
        """Refer to the result."""

    call_with_threads(2, partial(shared_work.share, work, 2))
    references: list[weakref.ref[object]] = [weakref.ref(result), weakref.ref(executor)]
    del work, result
    assert references[0]() is None
    del executor
    assert references[1]() is None, "the executor keeps an empty task for each part"


@needs_int8
def test_share_raises_no_error_before_all_parts_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts write to arrays that the caller may use again after the error."""
    from bge_rerank_integrations.engine.cpu import shared_work

    is_begun, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def work(start: int, _: int) -> None:
        if start == 1:  # in a thread of the executor
            is_begun.set()
            may_end.wait()
            ended.append(start)
        if start == 2:  # in the thread of the caller, because no other one can be started
            may_end.set()
            raise ValueError("no")

    def start_or_refuse(thread: threading.Thread) -> None:
        if is_begun.is_set():
            refuse_to_start(thread)
        start_thread(thread)
        is_begun.wait()

    with ThreadPoolExecutor(2) as executor:
        start_thread = threading.Thread.start
        monkeypatch.setattr(shared_work, "_executor", executor)
        monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
        with pytest.raises(ValueError, match="no"):
            call_with_threads(3, lambda: shared_work.share(work, 3))
        assert ended == [1]


@needs_int8
def test_products_end_while_the_interpreter_exits() -> None:
    code = """
import threading, torch
from bge_rerank_integrations.engine.cpu.shared_work import share
torch.set_num_threads(3)
done = []
share(lambda start, end: done.extend(range(start, end)), 7)

def late():
    threading.main_thread().join()
    torch.set_num_threads(3)
    late = []
    share(lambda start, end: late.extend(range(start, end)), 7)
    print(sorted(late))

threading.Thread(target=late).start()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[0, 1, 2, 3, 4, 5, 6]\n", "")


@pytest.fixture(params=["checkpoint", "wide_checkpoint"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Return a checkpoint with heads of 16, and then one with heads of 32."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@needs_int8
def test_int8_logits_are_near_float32(folder: Path) -> None:
    shape = read_shape(folder)
    exact, rounded = (
        load_runner(ScorerConfig(device="cpu", dtype=dtype), folder, shape) for dtype in ("float32", "int8")
    )
    sequences = random_ids([*range(1, 513, 5)], shape.vocab_size, seed=5)
    theirs = score_all(exact, sequences)
    ours = score_all(rounded, sequences)
    assert max_difference(ours, theirs) <= LOGIT_TOLERANCE[torch.int8]
    # From 0.9987 to 0.9992, with products of attention in float32 too.
    assert np.corrcoef(ours, theirs)[0, 1] > 0.998


@needs_int8
@pytest.mark.parametrize("max_batch_tokens", [1, 100, 600, 5000])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_batches_and_threads_do_not_change_int8_logits(
    folder: Path, max_batch_tokens: int, num_threads: int
) -> None:
    shape = read_shape(folder)
    config = ScorerConfig(
        device="cpu", dtype="int8", max_batch_tokens=max_batch_tokens, num_threads=num_threads
    )
    batched = load_runner(config, folder, shape)
    plain = load_runner(ScorerConfig(device="cpu", dtype="int8"), folder, shape)
    sequences = random_ids([*range(1, 300, 17)], shape.vocab_size, seed=6)
    alone = [logit for sequence in sequences for logit in score_all(plain, [sequence])]
    # Each row is quantized by itself, and sums of integers are exact. Only the head rounds.
    assert max_difference(score_all(batched, sequences), alone) <= 1e-6


@needs_int8
def test_int8_keeps_the_ranking_of_the_embedded_model() -> None:
    shape = read_shape(EMBEDDED_FOLDER)
    exact = load_runner(ScorerConfig(device="cpu", dtype="float32"), EMBEDDED_FOLDER, shape)
    rounded = load_runner(ScorerConfig(device="cpu", dtype="int8"), EMBEDDED_FOLDER, shape)
    check_rankings_agree(exact, rounded, min_tau=0.975, max_ndcg_difference=0.005)


@needs_int8
def test_int8_loads_only_the_word_embeddings_in_float16(checkpoint: Path) -> None:
    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=torch.device("cpu"), dtype=torch.int8)
    halves = {name for name, tensor in weights.items() if tensor.dtype is not torch.float32}
    assert halves == {"roberta.embeddings.word_embeddings.weight"}


@needs_int8
def test_int8_refuses_heads_whose_width_is_not_a_multiple_of_16(tmp_path: Path) -> None:
    folder = build_random_checkpoint(tmp_path, hidden_size=32, num_heads=4)
    with pytest.raises(UnsupportedCheckpointError, match="multiple of 16"):
        Scorer(folder, device="cpu", dtype="int8")


@needs_int8
def test_int8_is_described_by_its_own_kernels() -> None:
    report = describe_machine(ScorerConfig(device="cpu", dtype="int8"))
    assert (report.dtype, report.between_products) == ("int8", "kernels compiled by numba")
    assert report.attention_reason.startswith("Compute bidirectional attention within each sequence")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_int8_is_refused_on_other_devices_than_cpus(device: str) -> None:
    with pytest.raises(ConfigError, match="CPUs only"):
        ScorerConfig(device=device, dtype="int8")


@pytest.mark.parametrize("missing", ["numba"])
def test_int8_without_numba_names_the_command_to_install_it(checkpoint: Path, missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from bge_rerank_integrations import Scorer\n"
        f"Scorer({str(checkpoint)!r}, device='cpu', dtype='int8')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'pip install "bge-rerank-integrations[int8]"' in run.stderr


@needs_int8
@pytest.mark.parametrize("limit", ["AVX2", "SSE41"])
def test_int8_is_the_same_without_vnni(limit: str) -> None:
    """With a limit, oneDNN has no right products, and this package multiplies in int16."""
    code = (
        "from bge_rerank_integrations import Scorer\n"
        "with Scorer('embedded', device='cpu', dtype='int8') as scorer:\n"
        "    print(scorer.score([('what is a cat', 'A cat is an animal. ' * n) for n in range(1, 60)]))"
    )
    # On some processors, attention multiplies in bfloat16, which the limit turns off. It is then off in both runs.
    unlimited = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"} if HAS_PAIRS else {}
    vnni, limited = (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **each},
        )
        for each in (unlimited, {"ONEDNN_MAX_CPU_ISA": limit})
    )
    np.testing.assert_allclose(eval(vnni.stdout), eval(limited.stdout), atol=1e-5)


@pytest.mark.parametrize(
    ("has_vnni", "capability", "expected"),
    [(True, "AVX512", True), (False, "AVX2", True), (False, "AVX512", False), (False, "DEFAULT", False)],
)
def test_int8_is_recommended_where_it_is_faster(
    has_vnni: bool, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_support, "has_onednn_products", lambda: has_vnni)
    monkeypatch.setattr(int8_support, "find_spec", lambda _: None)  # only the CPU counts
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    report = describe_precision(ScorerConfig(device="cpu", dtype="float32"))
    assert (report.faster == "int8") is expected


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ATEN_CPU_CAPABILITY": "default"}, "it needs an x86-64 CPU with AVX2"),
        (
            {"ATEN_CPU_CAPABILITY": "avx2"},
            "the settings of numba (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES) exclude AVX2",
        ),
        ({"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set"),
    ],
)
def test_int8_is_refused_on_a_cpu_without_its_instructions(
    checkpoint: Path, environment: dict[str, str], reason: str
) -> None:
    code = (
        "from llvmlite import binding\n"
        "features = binding.FeatureMap({'sse2': True})\n"
        "binding.get_host_cpu_features = lambda: features\n"
        "from bge_rerank_integrations import Scorer\n"
        f"Scorer({str(checkpoint)!r}, device='cpu', dtype='int8')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert f"DeviceError: dtype 'int8' is not available: {reason}" in run.stderr
