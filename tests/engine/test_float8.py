"""float8 layers, run with torch's implementation of the same operator for CPUs.

Older releases of torch have the operator for CUDA only, or without a scale for each row. Tests that need it skip
there.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.blocks import Rows
from bge_rerank_integrations.engine.checkpoint.locate import EMBEDDED_FOLDER
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda.float8 import Float8Blocks, check_float8, dequantize, scaled_product
from bge_rerank_integrations.engine.cuda.fused_ops import PLAIN_OPS
from bge_rerank_integrations.engine.device import activation_dtype, resolve_dtype
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import pack
from bge_rerank_integrations.engine.runner import Runner, load_runner
from bge_rerank_integrations.errors import ConfigError, DeviceError
from tests.support.engine import CPU, plain_logits, random_ids
from tests.support.rankings import check_rankings_agree
from tests.support.tolerances import LOGIT_TOLERANCE


def cpu_has_float8() -> bool:
    try:
        check_float8(CPU, (64, 128))
    except DeviceError:
        return False
    return True


needs_cpu_float8 = pytest.mark.skipif(
    not cpu_has_float8(), reason=f"torch {torch.__version__} does not scale float8 products by row on a CPU"
)


def float8_model(checkpoint: Path) -> tuple[PackedCrossEncoder, dict[str, weakref.ref[Tensor]]]:
    """Return a float8 model, and weak references to the weights that it was built from."""
    shape = read_shape(checkpoint)
    weights = load_weights(checkpoint, shape, device=CPU, dtype=torch.bfloat16)
    references = {name: weakref.ref(tensor) for name, tensor in weights.items()}
    attention = resolve_attention(CPU, torch.bfloat16, shape.head_dim)
    model = PackedCrossEncoder(shape, weights, attention=attention, blocks=Float8Blocks(PLAIN_OPS))
    assert not weights
    return model, references


@needs_cpu_float8
@pytest.mark.parametrize("num_rows", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_scaled_product_equals_the_product_of_the_dequantized_factors(
    num_rows: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    # Rows and outputs of very different magnitude: a single scale would round the small ones to zero.
    x = torch.randn(num_rows, 48) * torch.logspace(-3, 3, num_rows)[:, None]
    matrix = torch.randn(32, 48) * torch.logspace(-3, 3, 32)[:, None]
    bias = torch.randn(32, dtype=torch.bfloat16) if has_bias else None
    rows, weight = PLAIN_OPS.quantize(x), PLAIN_OPS.quantize(matrix)
    product = scaled_product(rows, weight, bias)
    assert product.dtype is torch.bfloat16
    expected = dequantize(rows) @ dequantize(weight).t() + (0 if bias is None else bias.float())
    torch.testing.assert_close(product.float(), expected, rtol=2**-8, atol=1e-6)
    exact = x @ matrix.t() + (0 if bias is None else bias.float())
    norms = x.norm(dim=1, keepdim=True) * matrix.norm(dim=1)
    assert ((product.float() - exact).abs() <= 0.03 * norms + 2**-8 * exact.abs()).all()


@needs_cpu_float8
def test_float8_logits_are_near_float32(checkpoint: Path, plain_model: Any) -> None:
    model, _ = float8_model(checkpoint)
    sequences = random_ids([*range(2, 200, 5)], read_shape(checkpoint).vocab_size, seed=2)
    ours = model(pack(sequences, padding_idx=1, device=CPU)).tolist()
    theirs = plain_logits(plain_model, sequences)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.97
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= LOGIT_TOLERANCE[torch.float8_e4m3fn]


@needs_cpu_float8
@pytest.mark.slow  # torch multiplies float8 slowly on a CPU: several minutes on two cores
def test_float8_keeps_the_ranking_of_the_embedded_model() -> None:
    exact = load_runner(
        ScorerConfig(device="cpu", dtype="float32"), EMBEDDED_FOLDER, read_shape(EMBEDDED_FOLDER)
    )
    model, _ = float8_model(EMBEDDED_FOLDER)
    rounded = Runner(model, device=CPU, padding_idx=1, max_batch_tokens=2048)
    check_rankings_agree(exact, rounded, min_tau=0.96, max_ndcg_difference=0.005)


def test_a_float8_model_frees_the_matrices_that_it_quantized(checkpoint: Path) -> None:
    model, references = float8_model(checkpoint)
    kept = {name for name, reference in references.items() if reference() is not None}
    assert not [name for name in kept if name.endswith("dense.weight") and "encoder.layer" in name]
    assert "roberta.embeddings.word_embeddings.weight" in kept, "the embeddings are not quantized"
    assert model is not None


def test_selected_quantized_rows_keep_their_scales() -> None:
    values = torch.randn(5, 32) * torch.tensor([[1.0], [10], [100], [1000], [10000]])
    rows = Rows(values, PLAIN_OPS.quantize(values)).select(torch.tensor([3, 0], dtype=torch.int32))
    assert rows.quantized is not None
    assert torch.equal(rows.values, values[[3, 0]])
    torch.testing.assert_close(dequantize(rows.quantized), values[[3, 0]], rtol=1 / 16, atol=3)


def test_float8_refuses_widths_that_are_not_multiples_of_16() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16.* 1000 and 4096"):
        check_float8(CPU, (1000, 4096))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_config_with_float8_on_another_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"needs a CUDA device.*8\.9.*'{device}'"):
        ScorerConfig(device=device, dtype="float8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_float8_is_refused_where_auto_selects_another_device(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        Scorer(checkpoint, dtype="float8")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        resolve_dtype(ScorerConfig(dtype="float8"), CPU)


def test_activations_of_float8_are_bfloat16() -> None:
    assert activation_dtype(torch.float8_e4m3fn) is torch.bfloat16
    assert activation_dtype(torch.float16) is torch.float16
