"""Operators between matrix products: plain operators, Triton kernels, and the choice between them."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine.attention import sdpa_attention
from bge_rerank_integrations.engine.blocks import Quantized
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda.fused_ops import (
    PLAIN_OPS,
    FusedBlocks,
    FusedOps,
    check_ops,
    check_quantized,
    resolve_fused,
)
from bge_rerank_integrations.engine.describe import describe_machine
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import pack
from tests.support.engine import CPU, max_difference, random_ids
from tests.support.fused_ops import HALF, check_quantizing, check_values
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
    check_ops(PLAIN_OPS, CPU, dtype, (48, 80), quantizing=True)
    with pytest.raises(AssertionError):
        check_ops(ops, CPU, dtype, (48, 80), quantizing=True)


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
