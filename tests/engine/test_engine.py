"""The packed forward pass compared with `XLMRobertaForSequenceClassification` from transformers."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.config import DType
from bge_rerank_integrations.engine import build
from bge_rerank_integrations.engine import linear as linear_module
from bge_rerank_integrations.engine import runner as runner_module
from bge_rerank_integrations.engine.attention import (
    VarlenAttention,
    bfloat16_tile_attention,
    name_of,
    resolve_attention,
    tile_attention,
)
from bge_rerank_integrations.engine.attention_by_length import (
    contiguous_sdpa_attention,
    matmul_attention,
    product_attention,
    sdpa_attention,
)
from bge_rerank_integrations.engine.blocks import Blocks, PlainBlocks
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cpu.int8_support import int8_obstacle
from bge_rerank_integrations.engine.cpu.row_blocks import ROW_MULTIPLE, RowBlocks
from bge_rerank_integrations.engine.cuda.transfer import PlainTransfer
from bge_rerank_integrations.engine.device import resolve_max_batch_tokens
from bge_rerank_integrations.engine.linear import (
    LinearFactory,
    onednn_linear,
    plain_linear,
    resolve_linear,
    tile_linear,
)
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import Seqlens, pack
from bge_rerank_integrations.engine.padded_rows import round_up_rows
from bge_rerank_integrations.engine.runner import Runner, load_runner, load_runners
from tests.support.attention import BFLOAT16_ON_CPU, needs_numba, needs_pairs
from tests.support.engine import (
    CPU,
    LimitedMemory,
    max_difference,
    numbered,
    plain_logits,
    random_ids,
    score_all,
)
from tests.support.plain_model import load_plain_model
from tests.support.tolerances import LOGIT_TOLERANCE

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> Runner:
    return load_runner(ScorerConfig(device="cpu", dtype="float32"), checkpoint, read_shape(checkpoint))


@pytest.fixture(scope="module")
def vocab_size(checkpoint: Path) -> int:
    return read_shape(checkpoint).vocab_size


def test_logits_of_every_length_match_transformers(runner: Runner, plain_model: Any, vocab_size: int) -> None:
    sequences = random_ids(list(range(1, 513)), vocab_size)
    theirs = plain_logits(plain_model, sequences)
    assert np.std(theirs) > 0.5, "the comparison needs scores that vary"
    assert max_difference(score_all(runner, sequences), theirs) <= LOGIT_TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "lengths", [[7], [512], [3] * 300, [512, 1, 512, 2], [10, 10, 11, 11, 10]], ids=lambda ids: f"{len(ids)}"
)
def test_logits_of_mixed_and_equal_lengths_match_transformers(
    runner: Runner, plain_model: Any, vocab_size: int, lengths: list[int]
) -> None:
    sequences = random_ids(lengths, vocab_size, seed=1)
    theirs = plain_logits(plain_model, sequences)
    assert max_difference(score_all(runner, sequences), theirs) <= LOGIT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["checkpoint", "wide_checkpoint"])
def test_bfloat16_logits_match_transformers(
    name: str, request: pytest.FixtureRequest, vocab_size: int
) -> None:
    """The logits are within the tolerance of float32, and of transformers in bfloat16."""
    folder: Path = request.getfixturevalue(name)
    runner = load_runner(ScorerConfig(device="cpu", dtype="bfloat16"), folder, read_shape(folder))
    sequences = random_ids([*range(2, 513, 5)], vocab_size, seed=2)
    truth = plain_logits(load_plain_model(folder), sequences)
    theirs = plain_logits(load_plain_model(folder, torch.bfloat16), sequences)
    ours = score_all(runner, sequences)
    assert max_difference(ours, truth) <= LOGIT_TOLERANCE[torch.bfloat16]
    assert max_difference(ours, theirs) <= LOGIT_TOLERANCE[torch.bfloat16]
    assert np.corrcoef(ours, truth)[0, 1] > 0.999


@pytest.mark.parametrize("max_batch_tokens", [1, 100, 600, 5000, 100_000])
def test_logits_in_a_batch_equal_logits_alone(
    checkpoint: Path, runner: Runner, vocab_size: int, max_batch_tokens: int
) -> None:
    config = ScorerConfig(device="cpu", dtype="float32", max_batch_tokens=max_batch_tokens)
    batched = load_runner(config, checkpoint, read_shape(checkpoint))
    sequences = random_ids([*range(1, 300, 7)], vocab_size, seed=3)
    alone = [logit for sequence in sequences for logit in score_all(runner, [sequence])]
    assert max_difference(score_all(batched, sequences), alone) <= LOGIT_TOLERANCE[torch.float32]


def test_the_order_of_sequences_does_not_change_their_logits(runner: Runner, vocab_size: int) -> None:
    sequences = random_ids([5, 80, 33, 5, 200, 41, 80, 7, 512], vocab_size, seed=4)
    order = np.random.default_rng(5).permutation(len(sequences))
    original = score_all(runner, sequences)
    permuted = score_all(runner, [sequences[index] for index in order])
    expected = [original[index] for index in order]
    assert max_difference(permuted, expected) <= LOGIT_TOLERANCE[torch.float32]


def test_the_same_batch_twice_is_bit_identical(runner: Runner, vocab_size: int) -> None:
    sequences = random_ids([5, 80, 33, 5, 200], vocab_size, seed=6)
    assert score_all(runner, sequences) == score_all(runner, sequences)


@pytest.mark.parametrize("wrap", [lambda blocks: blocks, RowBlocks], ids=["all rows", "blocks of rows"])
@pytest.mark.parametrize(
    "linear", [plain_linear, onednn_linear, pytest.param(tile_linear, marks=needs_numba)]
)
def test_each_implementation_of_linear_layers_matches_transformers(
    checkpoint: Path,
    plain_model: Any,
    vocab_size: int,
    linear: LinearFactory,
    wrap: Callable[[Blocks], Blocks],
) -> None:
    if linear is onednn_linear and not torch.backends.mkldnn.is_available():
        pytest.skip("needs a torch built with oneDNN")
    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
    model = PackedCrossEncoder(shape, weights, attention=sdpa_attention, blocks=wrap(PlainBlocks(linear)))
    assert not weights, "the model removes every weight, so that no second copy remains"
    sequences = random_ids([9, 120, 120, 512], vocab_size, seed=7)
    logits = model(pack(sequences, padding_idx=1, device=CPU)).tolist()
    theirs = plain_logits(plain_model, sequences)
    assert max_difference(logits, theirs) <= LOGIT_TOLERANCE[torch.float32]


def test_position_ids_start_after_the_padding_index(runner: Runner) -> None:
    batch = pack(random_ids([3, 1, 2], 100), padding_idx=1, device=CPU)
    assert batch.positions.tolist() == [2, 3, 4, 2, 2, 3]
    assert batch.seqlens.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.seqlens.lengths, batch.seqlens.max_seqlen) == ((3, 1, 2), 3)
    assert batch.ids.dtype == batch.positions.dtype == torch.int32


def test_padding_rows_do_not_change_the_logits(checkpoint: Path, vocab_size: int) -> None:
    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
    model = PackedCrossEncoder(shape, weights, attention=sdpa_attention, blocks=PlainBlocks(plain_linear))
    sequences = random_ids([9, 120, 33], vocab_size, seed=9)
    exact = model(pack(sequences, padding_idx=1, device=CPU))
    filled = pack(sequences, padding_idx=1, device=CPU, row_multiple=100)
    assert len(filled.ids) == len(filled.positions) == 200
    assert filled.seqlens.cu_seqlens.tolist() == [0, 9, 129, 162]
    assert max_difference(model(filled).tolist(), exact.tolist()) <= LOGIT_TOLERANCE[torch.float32]


def test_rounding_up_rows_gives_few_sizes_and_little_padding() -> None:
    rounded = [round_up_rows(n) for n in range(1, 8193)]
    assert all(n <= r <= max(1.125 * n, n + 15) for n, r in enumerate(rounded, start=1))
    assert all(round_up_rows(r) == r for r in rounded)
    assert len(set(rounded)) <= 56


@pytest.mark.parametrize("num_threads", [1, 2])
def test_linear_layers_see_few_numbers_of_rows(checkpoint: Path, vocab_size: int, num_threads: int) -> None:
    """oneDNN keeps memory for each number of rows, which must not grow with every new request."""
    seen: set[int] = set()

    def recording_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        plain = plain_linear(weight, bias)

        def linear(x: Tensor) -> Tensor:
            seen.add(len(x))
            return plain(x)

        return linear

    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
    model = PackedCrossEncoder(
        shape,
        weights,
        attention=sdpa_attention,
        blocks=RowBlocks(PlainBlocks(recording_linear)),
        row_multiple=ROW_MULTIPLE,
    )
    runner = Runner(
        model,
        device=CPU,
        padding_idx=1,
        max_batch_tokens=1200,
        row_multiple=ROW_MULTIPLE,
        num_threads=num_threads,
    )
    for length in range(1, 401, 3):
        score_all(runner, random_ids([length, length, length // 2 + 1], vocab_size, seed=length))
    assert seen == set(range(16, 256 * num_threads + 1, 16))


def naive_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Softmax over explicit scores in float64, sequence by sequence and head by head."""
    output = torch.empty_like(q, dtype=torch.float64)
    q_bounds = q_seqlens.cu_seqlens.tolist()
    kv_bounds = kv_seqlens.cu_seqlens.tolist()
    for i in range(len(q_bounds) - 1):
        rows, columns = slice(q_bounds[i], q_bounds[i + 1]), slice(kv_bounds[i], kv_bounds[i + 1])
        for head in range(q.shape[1]):
            scores = q[rows, head].double() @ k[columns, head].double().T / q.shape[-1] ** 0.5
            output[rows, head] = F.softmax(scores, dim=-1) @ v[columns, head].double()
    return output


# A sequence of 1,500 tokens has more scores than `matmul_attention` computes in one product.
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [9, 4, 4, 1, 1], [64, 3], [1500]])
@pytest.mark.parametrize(
    ("attention", "device", "dtype", "tolerance"),
    [
        pytest.param(sdpa_attention, "cpu", torch.float32, 1e-5, id="sdpa-float32"),
        pytest.param(sdpa_attention, "cpu", torch.bfloat16, 2e-2, id="sdpa-bfloat16"),
        pytest.param(tile_attention, "cpu", torch.float32, 1e-5, id="tile-float32", marks=needs_numba),
        pytest.param(
            bfloat16_tile_attention, "cpu", torch.bfloat16, 2e-2, id="tile-bfloat16", marks=needs_pairs
        ),
        pytest.param(matmul_attention, "cpu", torch.float32, 1e-5, id="matmul-float32"),
        pytest.param(matmul_attention, "cpu", torch.bfloat16, 2e-2, id="matmul-bfloat16"),
        pytest.param(contiguous_sdpa_attention, "cpu", torch.float32, 1e-5, id="contiguous-float32"),
        pytest.param(product_attention, "cpu", torch.float32, 1e-5, id="product-float32"),
        pytest.param(product_attention, "cpu", torch.bfloat16, 2e-2, id="product-bfloat16"),
    ],
)
def test_attention_matches_explicit_scores_in_float64(
    attention: VarlenAttention, device: str, dtype: torch.dtype, tolerance: float, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    seqlens = pack(random_ids(lengths, 100), padding_idx=1, device=torch.device(device)).seqlens
    # Views with strides, as the fused projection returns them.
    head_dim = 32 if attention is bfloat16_tile_attention else 16  # the narrowest that each supports
    q, k, v = torch.randn(sum(lengths), 3, 4, head_dim, device=device, dtype=dtype).unbind(1)
    full = attention(q, k, v, seqlens, seqlens)
    assert full.is_contiguous()
    expected = naive_attention(q, k, v, seqlens, seqlens)
    assert (full.double() - expected).abs().max().item() <= tolerance
    first_rows = seqlens.cu_seqlens[:-1].long()
    first = attention(q[first_rows], k, v, seqlens.first_tokens(), seqlens)
    assert (first.double() - expected[first_rows]).abs().max().item() <= tolerance


def test_the_chosen_implementations_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bge_rerank_integrations"):
        # No width of 60 fits the tiles of `tile_attention`.
        assert resolve_attention(CPU, torch.float32, 60) is sdpa_attention
        assert name_of(resolve_attention(CPU, torch.bfloat16, 64)) == BFLOAT16_ON_CPU
        resolve_linear(CPU, torch.float32, 1)
    assert "sdpa_attention" in caplog.text
    assert "linear layers on cpu" in caplog.text


@pytest.mark.parametrize(
    ("capability", "has_fast_tiles", "has_numba", "has_mkl", "num_threads", "expected"),
    [
        ("AVX512", False, True, True, 2, onednn_linear),
        pytest.param("AVX512", True, True, True, 4, tile_linear, marks=needs_numba),
        ("AVX512", True, True, True, 5, onednn_linear),
        ("AVX512", True, False, True, 2, onednn_linear),
        pytest.param("AVX2", False, True, True, 4, tile_linear, marks=needs_numba),
        ("AVX2", False, True, True, 5, plain_linear),
        ("AVX2", False, False, True, 2, plain_linear),
        ("AVX2", False, False, False, 2, onednn_linear),
        ("DEFAULT", False, True, True, 2, onednn_linear),
    ],
)
def test_what_multiplies_floats_on_each_cpu(
    capability: str,
    has_fast_tiles: bool,
    has_numba: bool,
    has_mkl: bool,
    num_threads: int,
    expected: LinearFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs a torch built with oneDNN")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(linear_module, "has_fast_tiles", lambda: has_fast_tiles)
    monkeypatch.setattr(linear_module, "find_spec", {"numba": has_numba or None}.get)
    assert resolve_linear(CPU, torch.float32, num_threads) is expected


@pytest.mark.parametrize("error", [None, ImportError("numba needs another NumPy\nand more")])
def test_tiles_that_do_not_work_are_not_used(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        if error is not None:
            raise error
        return lambda x: plain_linear(weight, bias)(x) * 1.01

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear_module, "find_spec", {"numba": True}.get)
    monkeypatch.setattr(linear_module, "tile_linear", broken)
    assert resolve_linear(CPU, torch.float32, 1) is plain_linear
    expected = (
        "AssertionError: results differ by" if error is None else "ImportError: numba needs another NumPy)"
    )
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert expected in record.getMessage()


@needs_numba
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("nan_row", [None, 0, -1])
@pytest.mark.parametrize(
    ("num_rows", "width", "out"), [(1, 1, 1), (2, 40, 16), (6, 40, 17), (17, 33, 40), (305, 770, 2304)]
)
def test_tiles_match_float64_at_any_size(
    num_rows: int, width: int, out: int, nan_row: int | None, num_threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((width, num_rows), (out, width), (out,))
    )
    x = x.t()  # not contiguous
    if nan_row is not None:
        x[nan_row, -1] = float("nan")
    exact = x.double() @ weight.double().t() + bias.double()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = tile_linear(weight, bias)(x)
    finally:
        torch.set_num_threads(before)
    assert found.isnan().any().item() == (nan_row is not None)
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-3, equal_nan=True)


def two_configs(budget: int, dtype: DType, num_threads: int | None = None) -> list[ScorerConfig]:
    """Return two configs whose scorers share no model. No other test may use the budget and the next one."""
    return [
        ScorerConfig(device="cpu", dtype=dtype, num_threads=num_threads, max_batch_tokens=max_batch_tokens)
        for max_batch_tokens in (budget, budget + 1)
    ]


def test_loading_onto_a_gpu_waits_for_the_stream_of_the_thread_that_loads(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 1)
    done: list[object] = []

    def build_model(spec: build.ModelSpec) -> build.Model:
        done.append("build")
        return build.Model(lambda batch: torch.zeros(len(batch.seqlens.lengths)))

    monkeypatch.setattr(runner_module, "resolve_device", lambda _: device)
    monkeypatch.setattr(runner_module, "build_model", build_model)
    monkeypatch.setattr(runner_module, "resolve_transfer", lambda *_: PlainTransfer(device))
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    load_runner(ScorerConfig(device="cuda:1", max_batch_tokens=100), checkpoint, read_shape(checkpoint))
    assert done == ["build", device]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "bfloat16",
        pytest.param("int8", marks=pytest.mark.skipif(int8_obstacle() is not None, reason="needs int8")),
    ],
)
def test_the_default_dtype_of_torch_does_not_matter(
    checkpoint: Path, vocab_size: int, dtype: DType, default: torch.dtype
) -> None:
    """transformers sets it while it loads a model, also for other threads."""
    shape = read_shape(checkpoint)
    sequences = random_ids([9, 120, 33, 5], vocab_size, seed=11)
    config, other = two_configs(4321, dtype, num_threads=2)
    runner = load_runner(config, checkpoint, shape)
    expected = score_all(runner, sequences)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert score_all(runner, sequences) == expected
        assert score_all(load_runner(other, checkpoint, shape), sequences) == expected
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "setting", [lambda: torch.device("meta"), lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_loading_thread_has_set_in_torch_does_not_matter(
    checkpoint: Path,
    vocab_size: int,
    dtype: DType,
    setting: Callable[[], AbstractContextManager[object]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape = read_shape(checkpoint)
    sequences = random_ids([9, 120, 33, 5], vocab_size, seed=12)
    config, other = two_configs(5321, dtype)
    (runner,) = load_runners(config, checkpoint, shape)
    caplog.clear()
    with setting():
        (within,) = load_runners(other, checkpoint, shape)
    assert score_all(within, sequences) == score_all(runner, sequences)
    assert "is not used" not in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_loads_in_a_function_that_torch_compiles(
    checkpoint: Path, vocab_size: int, dtype: DType, caplog: pytest.LogCaptureFixture
) -> None:
    shape = read_shape(checkpoint)
    sequences = random_ids([9, 120, 33, 5], vocab_size, seed=14)
    config, other = two_configs(7321, dtype)
    (runner,) = load_runners(config, checkpoint, shape)
    loaded: list[Runner] = []

    def load(number: Tensor) -> Tensor:
        loaded.extend(load_runners(other, checkpoint, shape))
        return number + 1

    caplog.clear()
    assert torch.compile(load, backend="eager")(torch.ones(1)) == 2
    assert score_all(loaded[0], sequences) == score_all(runner, sequences)
    assert "is not used" not in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_that_the_process_has_excluded_for_a_gpu_do_not_matter(
    checkpoint: Path, vocab_size: int, dtype: DType, caplog: pytest.LogCaptureFixture
) -> None:
    shape = read_shape(checkpoint)
    sequences = random_ids([9, 120, 33, 5], vocab_size, seed=13)
    config, other = two_configs(6321, dtype)
    runner = load_runner(config, checkpoint, shape)
    expected = score_all(runner, sequences)
    caplog.clear()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert score_all(runner, sequences) == expected
        assert score_all(load_runner(other, checkpoint, shape), sequences) == expected
    assert "is not used" not in caplog.text


def test_a_slow_precision_is_logged_as_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "resolve_linear", lambda *_: plain_linear)
    shape = read_shape(checkpoint)
    expected: dict[DType, list[str]] = {
        "float32": [],
        "bfloat16": ["bfloat16 is much slower than float32 on this CPU"],
    }
    for dtype, warnings in expected.items():
        caplog.clear()
        config = ScorerConfig(device="cpu", dtype=dtype, max_batch_tokens=779)  # no other test uses it
        with caplog.at_level(logging.WARNING, "bge_rerank_integrations"):
            load_runner(config, checkpoint, shape)
        assert [record.getMessage().partition(",")[0] for record in caplog.records] == warnings


def test_every_precision_of_the_config_has_a_builder() -> None:
    names = {"float8": "float8_e4m3fn"}
    dtypes = {getattr(torch, names.get(name, name)) for name in get_args(DType) if name != "auto"}
    assert set(build._BUILDERS) == dtypes


def test_equal_configs_share_a_runner_until_the_last_one_is_freed(checkpoint: Path) -> None:
    shape = read_shape(checkpoint)
    budget = 777  # a budget that no other test uses
    first = load_runner(
        ScorerConfig(device="cpu", dtype="float32", max_batch_tokens=budget), checkpoint, shape
    )
    second = load_runner(
        ScorerConfig(device="cpu", dtype="float32", max_batch_tokens=budget, max_length=100, normalize=True),
        checkpoint,
        shape,
    )
    assert first is second
    for other in (
        {"max_batch_tokens": budget + 1},
        {"max_batch_tokens": budget, "dtype": "bfloat16"},
        {"max_batch_tokens": budget, "num_threads": 1},
    ):
        config = ScorerConfig.from_dict({"device": "cpu", "dtype": "float32", **other})
        assert load_runner(config, checkpoint, shape) is not first
    gone = weakref.ref(first)
    del first, second
    gc.collect()
    assert gone() is None, "the cache keeps no reference of its own"


def test_the_token_budget_of_a_cpu_grows_with_its_threads() -> None:
    few, many = (
        ScorerConfig(device="cpu", dtype="float32", num_threads=2),
        ScorerConfig(device="cpu", dtype="float32", num_threads=64),
    )
    assert resolve_max_batch_tokens(few, CPU) < resolve_max_batch_tokens(many, CPU)
    config = ScorerConfig(device="cpu", dtype="float32", num_threads=64, max_batch_tokens=100)
    assert resolve_max_batch_tokens(config, CPU) == 100


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cuda_logits_match_transformers(
    checkpoint: Path, plain_model: Any, vocab_size: int, dtype: str
) -> None:
    config = ScorerConfig(device="cuda", dtype=dtype)  # type: ignore[arg-type]
    runner = load_runner(config, checkpoint, read_shape(checkpoint))
    sequences = random_ids([*range(1, 513, 3)], vocab_size, seed=8)
    theirs = plain_logits(plain_model, sequences)
    assert max_difference(score_all(runner, sequences), theirs) <= LOGIT_TOLERANCE[getattr(torch, dtype)]


def runner_of(forward: Callable[[Any], Tensor], max_batch_tokens: int = 1000) -> Runner:
    return Runner(forward, device=CPU, padding_idx=1, max_batch_tokens=max_batch_tokens)


def test_out_of_memory_splits_the_batch_and_lowers_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    forward = LimitedMemory(max_tokens=300)
    runner = runner_of(forward)
    lengths = [100, 20, 30, 150, 290, 40, 10, 10, 200, 250, 3]
    with caplog.at_level(logging.WARNING):
        assert score_all(runner, numbered(lengths)) == list(range(len(lengths)))
    assert runner.max_batch_tokens <= 300 < 1000
    assert "out of memory" in caplog.text
    forward.tried.clear()
    assert score_all(runner, numbered(lengths)) == list(range(len(lengths)))
    assert max(forward.tried) <= 300, "the second request does not run out of memory again"
    assert runner.num_splits > 0


def test_the_token_budget_grows_back_when_memory_is_free_again() -> None:
    forward = LimitedMemory(max_tokens=300)
    runner = runner_of(forward)
    score_all(runner, numbered([100] * 20))
    assert runner.max_batch_tokens <= 300
    forward.max_tokens = 10**6
    for _ in range(400):
        score_all(runner, numbered([50, 50]))
    assert runner.max_batch_tokens == 1000


def test_a_single_sequence_that_does_not_fit_raises_out_of_memory() -> None:
    runner = runner_of(LimitedMemory(max_tokens=300))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        score_all(runner, numbered([100, 301]))
    assert score_all(runner, numbered([100, 100])) == [0, 1]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), MemoryError("host")])
def test_other_errors_are_raised_unchanged_without_a_retry(error: Exception) -> None:
    calls = []

    def forward(batch: Any) -> Tensor:
        calls.append(batch)
        raise error

    with pytest.raises(type(error)) as caught:
        score_all(runner_of(forward), numbered([5, 5]))
    assert caught.value is error
    assert len(calls) == 1


def test_progress_counts_every_sequence_once() -> None:
    done: list[int] = []
    score_all(runner_of(LimitedMemory(300)), numbered([100, 290, 10, 5, 200]), on_progress=done.append)
    assert sum(done) == 5


def test_no_sequences_give_no_logits(runner: Runner) -> None:
    assert score_all(runner, []) == []
