"""Operators between matrix products: plain operators, Triton kernels, and the choice between them."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine.attention_by_length import sdpa_attention
from bge_rerank_integrations.engine.blocks import Quantized
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda import fused_ops
from bge_rerank_integrations.engine.cuda.fused_ops import (
    PLAIN_OPS,
    FusedBlocks,
    FusedOps,
    check_ops,
    check_quantized,
    resolve_fused,
)
from bge_rerank_integrations.engine.cuda.linear_gelu import (
    device_seconds,
    least_fused_rows,
    plain_linear_gelu,
)
from bge_rerank_integrations.engine.describe import describe_machine
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import pack
from tests.support.engine import CPU, max_difference, random_ids
from tests.support.fused_ops import HALF, check_linear, check_quantizing, check_values
from tests.support.tolerances import LOGIT_TOLERANCE

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton (pip install triton)")


@needs_triton
def test_triton_kernels_match_float64_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from tests.support.fused_ops import check_interpreted_kernels as c; c()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "all agree", run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("num_rows", [1, 7, 1025])
@pytest.mark.parametrize("width", [384, 1000])
def test_plain_operators_match_float64(dtype: torch.dtype, num_rows: int, width: int) -> None:
    check_values(PLAIN_OPS, dtype, num_rows, width)
    check_quantizing(PLAIN_OPS, dtype, num_rows, width)
    check_linear(PLAIN_OPS.linear_gelu, dtype, num_rows, width, 48)


# Capabilities from Ampere to Blackwell. The first one has no float8.
@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_triton_kernels_compile_for_each_generation_of_devices(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bge_rerank_integrations.engine.cuda import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        "eps": "fp32",
        "codes": "*fp8e4nv",
        "scales": "*fp32",
        "width": "constexpr",
        "block": "constexpr",
    }
    names = ["_bias_gelu", "_add_norm"]
    if capability >= 89:
        names += ["_quantize", "_bias_gelu_quantize", "_add_norm_quantize"]
    for name in names:
        kernel: Any = getattr(kernels, name)
        parameters = list(inspect.signature(kernel.fn).parameters)
        # The arguments are addresses of tensors and constants of the model.
        signature = {parameter: types.get(parameter, "*bf16") for parameter in parameters}
        source = ASTSource(kernel, signature, constexprs={"width": 768, "block": 1024})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        assert ("e4m3" in compiled.asm["ptx"]) == ("quantize" in name), (
            "float8 by the hardware's own rounding"
        )


@needs_triton
@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize(("capability", "instruction"), [(90, "wgmma"), (100, "tcgen05")])
def test_the_fused_up_projection_compiles_to_tensor_cores(
    capability: int, instruction: str, half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bge_rerank_integrations.engine.cuda import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, columns, inner = kernels._TILE_ROWS, kernels._TILE_COLUMNS, kernels._TILE_INNER
    constants = {
        "num_inputs": 768,
        "num_outputs": 3072,
        "tile_rows": rows,
        "tile_columns": columns,
        "tile_inner": inner,
        "group": kernels._GROUP,
    }
    types = {
        "x": f"tensordesc<{half}[{rows}, {inner}]>",
        "weight": f"tensordesc<{half}[{columns}, {inner}]>",
        "bias": f"*{half}",
        "out": f"tensordesc<{half}[{rows}, {columns // 2}]>",
        "num_rows": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    kernel: Any = kernels._linear_gelu
    assert list(types) == list(inspect.signature(kernel.fn).parameters)
    source = ASTSource(kernel, types, constexprs=constants, attrs={(2,): [["tt.divisibility", 16]]})
    options = {"num_warps": 8, "num_stages": kernels._NUM_STAGES, **kernels._OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert instruction in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"], "the device loads tiles by itself"
    assert compiled.metadata.shared <= 227 << 10, "more than a program can have"
    assert "STL" not in compiled.asm["sass"], "registers are spilled to memory"


@needs_triton
@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_triton_attention_compiles_to_tensor_cores(
    head_dim: int, half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bge_rerank_integrations.engine.cuda import triton_attention as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel: Any = kernels._attend
    constants = {
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "block_queries": kernels._BLOCK_QUERIES,
        "block_keys": kernels._BLOCK_KEYS,
    }
    types = {
        **dict.fromkeys(["q", "k", "v", "out"], f"*{half}"),
        **dict.fromkeys(["q_bounds", "kv_bounds"], "*i32"),
        **dict.fromkeys(["num_blocks", "q_stride", "kv_stride", "out_stride"], "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    parameters = list(inspect.signature(kernel.fn).parameters)
    assert list(types) == parameters
    aligned = [
        parameters.index(name) for name in ("q", "k", "v", "out", "q_stride", "kv_stride", "out_stride")
    ]
    source = ASTSource(
        kernel,
        types,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {
        "num_warps": kernels._NUM_WARPS,
        "num_stages": kernels._NUM_STAGES,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    assert "STL" not in compiled.asm["sass"], "registers are spilled to memory"


@needs_triton
def test_triton_attention_compiles_no_new_kernel_for_other_batches() -> None:
    from bge_rerank_integrations.engine.cuda import triton_attention as kernels

    kernel: Any = kernels._attend
    by_name = {parameter.name: parameter for parameter in kernel.params}
    assert by_name["num_blocks"].do_not_specialize
    # These are parts of one upload, and start anywhere in it.
    assert by_name["q_bounds"].do_not_specialize_on_alignment
    assert by_name["kv_bounds"].do_not_specialize_on_alignment


@needs_triton
def test_a_new_number_of_rows_does_not_compile_a_new_kernel() -> None:
    from bge_rerank_integrations.engine.cuda import triton_kernels as kernels

    kernel: Any = kernels._linear_gelu
    variable = {parameter.name: parameter for parameter in kernel.params if not parameter.is_constexpr}
    assert list(variable) == ["x", "weight", "bias", "out", "num_rows"]
    assert variable["num_rows"].do_not_specialize


def slow_or_fast(share: dict[int, float]) -> Callable[..., float]:
    """Return a timer by which the fused kernel takes a share of the time, for each number of rows."""

    def seconds(function: Any, device: torch.device) -> float:
        return share[len(function.args[0])] if function.func is plain_linear_gelu else 1.0

    return seconds


def separate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return PLAIN_OPS.bias_gelu(F.linear(x, weight), bias)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ({512: 0.9, 2048: 0.9, 8192: 0.9}, 512),
        ({512: 1.5, 2048: 0.9, 8192: 0.9}, 2048),
        ({512: 0.9, 2048: 0.99, 8192: 0.9}, 8192),
        ({512: 0.9, 2048: 0.9, 8192: 0.98}, None),
        ({512: 1.5, 2048: 1.5, 8192: 1.5}, None),
    ],
)
def test_the_fused_up_projection_is_used_where_it_is_faster(
    share: dict[int, float], expected: int | None
) -> None:
    least = least_fused_rows(plain_linear_gelu, separate, CPU, torch.float16, (16, 32), slow_or_fast(share))
    assert least == expected


def test_a_wrong_or_failing_up_projection_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def failing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    def out_of_memory(function: object, device: torch.device) -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    fast = slow_or_fast({512: 0.1, 2048: 0.1, 8192: 0.1})
    with caplog.at_level(logging.INFO, "bge_rerank_integrations"):
        for fused, seconds in ((wrong, fast), (failing, fast), (plain_linear_gelu, out_of_memory)):
            assert least_fused_rows(fused, separate, CPU, torch.float32, (16, 32), seconds) is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for line, reason in zip(lines, ["AssertionError", "shared memory", "out of memory"], strict=True):
        assert reason in line


def test_the_time_of_a_device_leaves_out_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in sleeps while the calls are launched, and then takes two milliseconds for each."""
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.place = 0

        def record(self) -> None:
            self.place = done.count("call")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 2.0 * (other.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    assert device_seconds(lambda: done.append("call"), CPU) == pytest.approx(0.002)
    assert done[:3] == ["call", "sleep", "call"], "the first call may compile, and is not timed"


@needs_triton
@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "plain operators (RuntimeError: Triton needs compute capability 8.0, and cuda:0 has 7.5)"),
        ((8, 0), "Triton"),
        ((9, 0), "Triton, GELU in the up projection from 2048 rows on"),
    ],
)
def test_kernels_are_tried_where_they_can_work(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def compile_kernels() -> FusedOps:
        calls.append("compile")
        return PLAIN_OPS._replace(name="Triton")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(fused_ops, "_triton_ops", compile_kernels)
    monkeypatch.setattr(fused_ops, "on_device", lambda _: nullcontext())
    monkeypatch.setattr(fused_ops, "check_ops", lambda *_, **__: None)
    monkeypatch.setattr(fused_ops, "least_fused_rows", lambda *_: 2048)
    ops = resolve_fused(torch.device("cuda", 0), torch.float16, (16, 32), quantizing=False)
    assert calls == (["compile"] if capability >= (8, 0) else [])
    assert ops.name == name
    assert (ops.linear_gelu is PLAIN_OPS.linear_gelu) == (capability < (9, 0))


@needs_triton
@pytest.mark.parametrize("least_rows", [1, 2048, None])
def test_inputs_of_enough_rows_take_the_fused_up_projection(
    least_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bge_rerank_integrations.engine.cuda import triton_kernels

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return separate(x, weight, bias) + 1

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fused_ops, "_triton_ops", lambda: PLAIN_OPS._replace(linear_gelu=separate))
    monkeypatch.setattr(fused_ops, "on_device", lambda _: nullcontext())
    monkeypatch.setattr(fused_ops, "check_ops", lambda *_, **__: None)
    monkeypatch.setattr(fused_ops, "least_fused_rows", lambda *_: least_rows)
    monkeypatch.setattr(triton_kernels, "linear_gelu", fused)
    ops = resolve_fused(torch.device("cuda", 0), torch.float16, (16, 32), quantizing=False)
    weight, bias = torch.randn(32, 16), torch.randn(32)
    for num_rows in (1, 2047, 2048, 3000):
        x = torch.randn(num_rows, 16)
        expected = fused if least_rows is not None and num_rows >= least_rows else separate
        assert torch.equal(ops.linear_gelu(x, weight, bias), expected(x, weight, bias))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantizing_keeps_values_that_are_not_finite(value: float) -> None:
    x = torch.ones(2, 32)
    x[1, 3] = value
    codes, scales = PLAIN_OPS.quantize(x)
    dequantized = codes.float() * scales
    assert dequantized[0].isfinite().all()
    assert not dequantized[1].isfinite().all()


def _off(x: Tensor) -> Tensor:
    return x * 1.05


def _off_quantized(quantized: Quantized) -> Quantized:
    return Quantized(quantized.codes, quantized.scales * 1.05)


WRONG = [
    PLAIN_OPS._replace(bias_gelu=lambda x, bias: F.gelu(x + bias, approximate="tanh") * 1.02),
    PLAIN_OPS._replace(add_norm=lambda *args: _off(PLAIN_OPS.add_norm(*args))),
    PLAIN_OPS._replace(quantize=lambda x: _off_quantized(PLAIN_OPS.quantize(x))),
    PLAIN_OPS._replace(
        bias_gelu_quantize=lambda x, bias: _off_quantized(PLAIN_OPS.bias_gelu_quantize(x, bias))
    ),
    PLAIN_OPS._replace(
        add_norm_quantize=lambda *args: (
            PLAIN_OPS.add_norm(*args),
            _off_quantized(PLAIN_OPS.add_norm_quantize(*args)[1]),
        )
    ),
]


@pytest.mark.parametrize("ops", WRONG, ids=["gelu", "norm", "quantize", "gelu-quantize", "norm-quantize"])
@pytest.mark.parametrize("dtype", HALF)
def test_check_ops_detects_a_wrong_operator(ops: FusedOps, dtype: torch.dtype) -> None:
    quantizing = ops not in WRONG[:2]
    check_ops(PLAIN_OPS, CPU, dtype, (48, 80), quantizing=quantizing)
    with pytest.raises(AssertionError):
        check_ops(ops, CPU, dtype, (48, 80), quantizing=quantizing)
    check_ops(ops, CPU, dtype, (48, 80), quantizing=not quantizing)  # the model does not call it


def test_check_quantized_detects_wrong_codes() -> None:
    right = PLAIN_OPS.quantize(torch.linspace(-1, 1, 64)[None])
    check_quantized(right, right)
    with pytest.raises(AssertionError):
        check_quantized(Quantized((-right.codes.float()).to(right.codes.dtype), right.scales), right)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_failure_selects_plain_operators_and_logs_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bge_rerank_integrations"):
        ops = resolve_fused(torch.device("cuda", 0), torch.float16, (48, 80), quantizing=True)
    assert ops.is_plain
    assert ops.name.startswith("plain operators (")
    assert caplog.text.count("operators between matrix products") == 1
    assert resolve_fused(CPU, torch.bfloat16, (48, 80), quantizing=False) is PLAIN_OPS


def test_describe_machine_names_the_operators_of_a_cpu() -> None:
    report = describe_machine(ScorerConfig(device="cpu"))
    assert (report.between_products, report.max_graph_tokens) == ("plain operators", 0)


def test_fused_layers_match_plain_layers(checkpoint: Path) -> None:
    shape = read_shape(checkpoint)
    logits = []
    for blocks in (None, FusedBlocks(PLAIN_OPS)):
        weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.float32)
        model = PackedCrossEncoder(shape, weights, attention=sdpa_attention, blocks=blocks)
        assert not weights
        sequences = random_ids([9, 120, 120, 512], shape.vocab_size, seed=7)
        logits.append(model(pack(sequences, padding_idx=1, device=CPU)).tolist())
    assert max_difference(*logits) <= LOGIT_TOLERANCE[torch.float32]
