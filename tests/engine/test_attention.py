"""The choice of the attention implementation, with stand-ins for the kernels that need a GPU."""

from __future__ import annotations

import inspect
import logging
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bge_rerank_integrations.engine import attention as attention_module
from bge_rerank_integrations.engine import attention_by_length
from bge_rerank_integrations.engine.attention import (
    CANDIDATES,
    Candidate,
    VarlenAttention,
    bfloat16_tile_attention,
    efficient_attention,
    flash_attention,
    flash_attention_3,
    name_of,
    resolve_attention,
    tile_attention,
    triton_attention,
    varlen_attention,
    works_in_graphs,
)
from bge_rerank_integrations.engine.attention_by_length import (
    contiguous_sdpa_attention,
    matmul_attention,
    product_attention,
    sdpa_attention,
)
from bge_rerank_integrations.engine.attention_trial import try_attention
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import Seqlens, pack
from bge_rerank_integrations.errors import DeviceError
from tests.support.attention import (
    WHOLE_BATCH,
    attend_bounds,
    cuda_operators_on_cpu,
    metal_sdpa,
    needs_numba,
    needs_pairs,
)
from tests.support.engine import CPU, max_difference, random_ids
from tests.support.tolerances import LOGIT_TOLERANCE

CUDA = torch.device("cuda", 0)
MPS = torch.device("mps")
FLOATING = [torch.float32, torch.float16, torch.bfloat16]


def wrong_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Right for whole sequences, wrong for the first tokens of the last layer."""
    output = sdpa_attention(q, k, v, q_seqlens, kv_seqlens)
    return output if q_seqlens is kv_seqlens else output.roll(1, 0)


def nan_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    output = sdpa_attention(q, k, v, q_seqlens, kv_seqlens)
    output[-1] = torch.nan
    return output


def failing_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.\nmore")


def crowded_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def use_candidates(monkeypatch: pytest.MonkeyPatch, *attentions: VarlenAttention) -> None:
    candidates = [Candidate(attention, lambda *_: True) for attention in attentions]
    monkeypatch.setattr(attention_module, "CANDIDATES", candidates)


def test_the_first_candidate_that_agrees_with_plain_attention_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_candidates(
        monkeypatch, failing_attention, wrong_attention, nan_attention, product_attention, sdpa_attention
    )
    with caplog.at_level(logging.INFO, "bge_rerank_integrations"):
        assert resolve_attention(CPU, torch.float32, 64) is product_attention
    failing, wrong, nan, chosen = (record.getMessage() for record in caplog.records)
    assert "failing_attention is not used (RuntimeError: USE_FLASH_ATTENTION was not enabled" in failing
    assert "more" not in failing, "one line"
    assert "wrong_attention is not used (AssertionError: results differ by" in wrong
    assert "nan_attention is not used (AssertionError: results differ by inf" in nan
    assert chosen.endswith("product_attention")


def test_a_device_without_a_working_candidate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_candidates(monkeypatch, failing_attention, wrong_attention)
    with pytest.raises(DeviceError, match=r"attention on cpu in torch\.float32 incorrectly or not at all"):
        resolve_attention(CPU, torch.float32, 64)


def test_a_trial_that_runs_out_of_memory_does_not_select_a_slower_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_candidates(monkeypatch, crowded_attention, sdpa_attention)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        resolve_attention(CPU, torch.float32, 64)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 100])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("attention", [sdpa_attention, contiguous_sdpa_attention, product_attention])
def test_right_candidates_pass_the_trial(
    attention: VarlenAttention, dtype: torch.dtype, head_dim: int
) -> None:
    try_attention(attention, CPU, dtype, head_dim, works_in_graphs=False)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("attention", WHOLE_BATCH)
def test_kernels_for_whole_batches_get_what_they_need(attention: VarlenAttention, dtype: torch.dtype) -> None:
    operator = "efficient" if attention is efficient_attention else "flash"
    with cuda_operators_on_cpu() as called:
        try_attention(attention, CPU, dtype, 64, works_in_graphs=True)
    assert called == [operator, operator], "one call for all sequences"


@pytest.mark.parametrize("attention", WHOLE_BATCH)
def test_the_installed_torch_accepts_the_arguments(attention: VarlenAttention) -> None:
    rows = torch.empty(9, 3, 2, 64, dtype=torch.float16, device="meta")
    seqlens = Seqlens((9,), torch.empty(2, dtype=torch.int32, device="meta"), 9)
    q, k, v = rows.unbind(1)
    attended = attention(q, k, v, seqlens, seqlens)
    assert (attended.shape, attended.is_contiguous()) == ((9, 2, 64), True)


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_3_of_every_release_is_understood(
    with_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_varlen_func(*args: Any) -> Any:
        attended = attend_bounds(*args)
        return (attended, torch.empty(0)) if with_sums else attended

    module: Any = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    try_attention(flash_attention_3, CPU, torch.bfloat16, 64, works_in_graphs=True)


@pytest.mark.parametrize("attention", WHOLE_BATCH)
def test_a_model_with_kernels_for_whole_batches_gives_the_same_logits(
    checkpoint: Path, attention: VarlenAttention
) -> None:
    shape = read_shape(checkpoint)

    def model_with(attention: VarlenAttention) -> PackedCrossEncoder:
        weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
        return PackedCrossEncoder(shape, weights, attention=attention)

    batch = pack(random_ids([9, 120, 33, 33, 512], shape.vocab_size, seed=7), padding_idx=1, device=CPU)
    with cuda_operators_on_cpu() as called:
        ours = model_with(attention)(batch).tolist()
    assert len(called) == shape.num_layers
    expected = model_with(sdpa_attention)(batch).tolist()
    assert max_difference(ours, expected) <= LOGIT_TOLERANCE[torch.float32]


HALF_ON_CUDA = [flash_attention, varlen_attention, efficient_attention, sdpa_attention, product_attention]
ON_CPU = [sdpa_attention, product_attention]
WITH_PRODUCTS = [matmul_attention, *ON_CPU]
OLDER = [efficient_attention, sdpa_attention, product_attention]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "machine", "expected"),
    [
        (CUDA, torch.float16, 64, {"capability": (8, 0)}, HALF_ON_CUDA),
        (CUDA, torch.bfloat16, 64, {"capability": (9, 0)}, HALF_ON_CUDA),
        (CUDA, torch.bfloat16, 64, {"capability": (9, 0), "flash_3": True}, [flash_attention_3, *HALF_ON_CUDA]),
        (CUDA, torch.bfloat16, 64, {"capability": (9, 0), "triton": True}, [triton_attention, *HALF_ON_CUDA]),
        (CUDA, torch.float16, 48, {"capability": (9, 0), "triton": True}, HALF_ON_CUDA),
        (CUDA, torch.float16, 64, {"capability": (8, 0), "triton": True}, HALF_ON_CUDA),
        (CUDA, torch.float32, 64, {"capability": (9, 0), "triton": True}, OLDER),
        (CUDA, torch.float16, 64, {"capability": (12, 0), "flash_3": True}, HALF_ON_CUDA),
        (CUDA, torch.float16, 64, {"capability": (8, 6), "flash": False}, OLDER),
        (CUDA, torch.float16, 60, {"capability": (8, 6)}, OLDER),
        (CUDA, torch.float16, 512, {"capability": (8, 6)}, OLDER),
        (CUDA, torch.float32, 64, {"capability": (9, 0), "flash_3": True}, OLDER),
        (CUDA, torch.float16, 64, {"capability": (7, 5)}, OLDER),
        (CUDA, torch.float32, 64, {"capability": (6, 1)}, OLDER),
        (CUDA, torch.bfloat16, 64, {"capability": (7, 5)}, [sdpa_attention, product_attention]),
        (CUDA, torch.float16, 64, {"capability": (9, 0), "hip": "6.4"}, [sdpa_attention, product_attention]),
        (MPS, torch.float32, 64, {}, [contiguous_sdpa_attention, product_attention]),
        (MPS, torch.float16, 64, {}, [contiguous_sdpa_attention, product_attention]),
        (CPU, torch.float32, 64, {"numba": True, "cpu": "AVX512"}, [tile_attention, *ON_CPU]),
        (CPU, torch.float32, 64, {"numba": True, "cpu": "AVX2"}, [tile_attention, *ON_CPU]),
        (CPU, torch.float32, 64, {"numba": True, "cpu": "DEFAULT"}, ON_CPU),
        (CPU, torch.float32, 64, {"numba": False, "cpu": "AVX512"}, ON_CPU),
        (CPU, torch.float32, 24, {"numba": True, "cpu": "AVX512"}, ON_CPU),
        (CPU, torch.bfloat16, 64, {"numba": True, "pairs": True}, [bfloat16_tile_attention, *WITH_PRODUCTS]),
        (CPU, torch.bfloat16, 64, {"numba": True, "amx": True}, [bfloat16_tile_attention, *WITH_PRODUCTS]),
        (CPU, torch.bfloat16, 64, {"numba": True, "pairs": False}, WITH_PRODUCTS),
        (CPU, torch.bfloat16, 64, {"numba": True, "pairs": True, "compiled": False}, WITH_PRODUCTS),
        (CPU, torch.bfloat16, 64, {"numba": True, "amx": True, "compiled": False}, WITH_PRODUCTS),
        (CPU, torch.bfloat16, 48, {"numba": True, "pairs": True}, WITH_PRODUCTS),
        (CPU, torch.bfloat16, 64, {"numba": False, "pairs": True}, WITH_PRODUCTS),
        (CPU, torch.bfloat16, 64, {"numba": False, "amx": True}, WITH_PRODUCTS),
    ],
)  # fmt: skip
def test_candidates_of_each_device(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    machine: dict[str, Any],
    expected: list[VarlenAttention],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine["capability"])
    monkeypatch.setattr(
        torch.backends.cuda, "is_flash_attention_available", lambda: machine.get("flash", True)
    )
    monkeypatch.setattr(torch.version, "hip", machine.get("hip"))
    if "num_splits" not in inspect.signature(varlen_attn).parameters:
        expected = [attention for attention in expected if attention is not varlen_attention]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: machine.get("cpu"))
    found = {
        "flash_attn_interface": machine.get("flash_3"),
        "triton": machine.get("triton"),
        "numba": machine.get("numba") or None,
    }
    monkeypatch.setattr(attention_module, "find_spec", found.get)
    monkeypatch.setattr(attention_module, "has_fast_pairs", lambda: machine.get("pairs", False))
    monkeypatch.setattr(attention_module, "has_amx", lambda: machine.get("amx", False))
    compiler: Any = ModuleType("compiler")
    compiler.HAS_PAIRS = machine.get("compiled", machine.get("numba", False))
    monkeypatch.setitem(sys.modules, "bge_rerank_integrations.engine.cpu.compiler", compiler)
    fitting = [each.attention for each in CANDIDATES if each.fits(device, dtype, head_dim)]
    assert list(map(name_of, fitting)) == list(map(name_of, expected))


def test_kernels_for_whole_batches_can_be_captured() -> None:
    for attention in (
        flash_attention_3,
        triton_attention,
        flash_attention,
        varlen_attention,
        efficient_attention,
    ):
        assert works_in_graphs(attention)
    for attention in (
        sdpa_attention,
        contiguous_sdpa_attention,
        product_attention,
        tile_attention,
        bfloat16_tile_attention,
    ):
        assert not works_in_graphs(attention)


def test_the_trial_detects_the_faulty_metal_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", metal_sdpa)
    with pytest.raises(AssertionError, match="results differ by"):
        try_attention(
            partial(attention_by_length._attend_runs, metal_sdpa),
            CPU,
            torch.float32,
            64,
            works_in_graphs=False,
        )
    try_attention(contiguous_sdpa_attention, CPU, torch.float32, 64, works_in_graphs=False)
    try_attention(product_attention, CPU, torch.float32, 64, works_in_graphs=False)


@pytest.mark.parametrize("first_tokens", [False, True])
def test_only_contiguous_tensors_reach_the_operator_on_metal(
    first_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[tuple[tuple[int, ...], bool]] = []

    def record(*tensors: Tensor) -> Tensor:
        reached.extend((tuple(tensor.shape), tensor.is_contiguous()) for tensor in tensors)
        return metal_sdpa(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    # As the last layer calls it: three sequences of one length, keys and values from one projection.
    seqlens = Seqlens((5, 5, 5), torch.tensor([0, 5, 10, 15], dtype=torch.int32), 5)
    q, k, v = torch.randn(15, 3, 4, 64).unbind(1)
    q_seqlens = seqlens.first_tokens() if first_tokens else seqlens
    contiguous_sdpa_attention(q[: len(q_seqlens.lengths) if first_tokens else 15], k, v, q_seqlens, seqlens)
    assert reached == [((3, 4, 1 if first_tokens else 5, 64), True), *[((3, 4, 5, 64), True)] * 2]


def test_the_trial_runs_on_the_width_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
        widths.append(q.shape[-1])
        return sdpa_attention(q, k, v, q_seqlens, kv_seqlens)

    use_candidates(monkeypatch, recording)
    resolve_attention(CPU, torch.float32, 24)
    assert widths == [24, 24]


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        pytest.param(tile_attention, torch.float32, 1e-5, marks=needs_numba),
        pytest.param(bfloat16_tile_attention, torch.bfloat16, 2e-2, marks=needs_pairs),
    ],
)
def test_tiles_read_tensors_of_any_layout(
    attention: VarlenAttention, dtype: torch.dtype, tolerance: float
) -> None:
    seqlens = pack(random_ids([7, 20], 100), padding_idx=1, device=CPU).seqlens
    heads_first = torch.randn(3, 2, 27, 32).to(dtype)
    q, k, v = heads_first.transpose(1, 2)
    expected = sdpa_attention(q.float(), k.float(), v.float(), seqlens, seqlens)
    assert (attention(q, k, v, seqlens, seqlens) - expected).abs().max().item() <= tolerance


@needs_pairs
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_bfloat16_tiles_pass_the_trial(head_dim: int) -> None:
    try_attention(bfloat16_tile_attention, CPU, torch.bfloat16, head_dim, works_in_graphs=False)


@needs_pairs
@pytest.mark.parametrize("lengths", [[2], [15, 16, 17], [31, 33, 64, 65], [512, 3]])
def test_bfloat16_tiles_are_nearer_to_the_exact_result_than_products(lengths: list[int]) -> None:
    """Scores and sums stay in float32. Only the softmax weights and the result are rounded."""
    seqlens = pack(random_ids(lengths, 100), padding_idx=1, device=CPU).seqlens
    rows = torch.randn(sum(lengths), 3, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = rows.unbind(1)
    exact = sdpa_attention(q.double(), k.double(), v.double(), seqlens, seqlens)

    def error(attention: VarlenAttention) -> float:
        return (attention(q, k, v, seqlens, seqlens).double() - exact).abs().mean().item()

    assert error(bfloat16_tile_attention) <= error(matmul_attention) + 1e-9


TILES = [
    pytest.param(tile_attention, torch.float32, marks=needs_numba),
    pytest.param(bfloat16_tile_attention, torch.bfloat16, marks=needs_pairs),
]


@pytest.mark.parametrize(("attention", "dtype"), TILES)
@pytest.mark.parametrize("wrong", [0, 1, 2])  # queries, keys, values
@pytest.mark.parametrize("lengths", [[20, 37], [37, 20], [1, 2], [2, 1]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tiles_keep_what_is_not_finite(
    attention: VarlenAttention, dtype: torch.dtype, wrong: int, lengths: list[int], value: float
) -> None:
    """A score that could be wrong must become NaN, so that it is refused. Others must not change."""
    seqlens = pack(random_ids(lengths, 100), padding_idx=1, device=CPU).seqlens
    rows = torch.randn(sum(lengths), 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[sum(lengths) // 2, wrong, 1, 7] = value
    q, k, v = rows.unbind(1)
    # torch's own kernel returns zero where all scores of a query are NaN.
    exact = product_attention(q, k, v, seqlens, seqlens)
    assert torch.equal(attention(q, k, v, seqlens, seqlens).isfinite(), exact.isfinite())


@pytest.mark.parametrize(("attention", "dtype"), TILES)
@pytest.mark.parametrize("scale", [1e2, 1e5])
def test_tiles_are_right_for_large_scores(
    attention: VarlenAttention, dtype: torch.dtype, scale: float
) -> None:
    seqlens = pack(random_ids([20, 37], 100), padding_idx=1, device=CPU).seqlens
    rows = torch.randn(57, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    rows[:, :2] *= scale
    q, k, v = rows.to(dtype).unbind(1)
    exact = sdpa_attention(q.double(), k.double(), v.double(), seqlens, seqlens)
    difference = (attention(q, k, v, seqlens, seqlens).double() - exact).abs().max().item()
    assert difference <= (2e-2 if dtype is torch.bfloat16 else 1e-3)


def test_a_candidate_whose_library_is_broken_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fits(*_: object) -> bool:
        raise ImportError("Numba needs NumPy 2.3 or less")

    candidates = (Candidate(failing_attention, fits), Candidate(sdpa_attention, lambda *_: True))
    monkeypatch.setattr(attention_module, "CANDIDATES", candidates)
    assert resolve_attention(CPU, torch.float32, 64) is sdpa_attention
    assert "failing_attention is not used (ImportError: Numba needs NumPy" in caplog.text


def test_an_implementation_on_one_thread_is_not_used_when_torch_has_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def on_one_thread(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
        calls.append(len(q))
        return sdpa_attention(q, k, v, q_seqlens, kv_seqlens)

    candidate = Candidate(on_one_thread, lambda *_: True, with_many_threads=sdpa_attention)
    monkeypatch.setattr(attention_module, "CANDIDATES", (candidate,))
    attention = resolve_attention(CPU, torch.float32, 64)
    assert calls, "it is tried"
    assert name_of(attention) == "on_one_thread"
    seqlens = pack([np.arange(5, dtype=np.int32)], padding_idx=1, device=CPU).seqlens
    q, k, v = torch.randn(3, 5, 2, 64)
    for num_threads, expected in ((1, [5]), (4, [])):
        calls.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)  # noqa: B023
        assert torch.equal(attention(q, k, v, seqlens, seqlens), sdpa_attention(q, k, v, seqlens, seqlens))
        assert calls == expected


# Each head of the trial's 3 neighbours of 33 tokens, which are padded to 48, has 2,304 scores.
@pytest.mark.parametrize("max_scores", [1, 1000, 2304, 5000, 20_000])
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        (product_attention, torch.float32),
        (matmul_attention, torch.float32),
        (matmul_attention, torch.bfloat16),
    ],
)
def test_products_with_many_scores_are_divided(
    attention: VarlenAttention, dtype: torch.dtype, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_by_length, "_MAX_SCORES", max_scores)
    monkeypatch.setattr(attention_by_length, "_MAX_PLAIN_SCORES", max_scores)
    try_attention(attention, CPU, dtype, 64, works_in_graphs=False)


@pytest.mark.parametrize("num_heads", [1, 6, 12, 16])
def test_products_have_few_shapes_and_scores_that_fit_into_a_cache(num_heads: int) -> None:
    for length in (16, 128, 256, 512, 1024, 8192):
        sizes = set()
        for num_sequences in range(1, 40):
            covered = np.zeros((num_sequences, num_heads), int)
            for part in attention_by_length._parts(num_sequences, num_heads, length, 1 << 20):
                covered[part] += 1
                sizes.add(covered[part].size)
            assert (covered == 1).all(), "each head of each sequence is in one part"
        assert len(sizes) <= 5
        assert max(sizes) == 1 or max(sizes) * length**2 <= 1 << 20
