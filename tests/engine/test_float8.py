"""Products in float8, on torch's own implementation for CPUs, which has the same operator.

Older releases of torch have it for CUDA only, or without a scale for each row; the tests that need it skip there.
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
from tests.support.rankings import check_on_cranfield
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
    """Return a model, and what became of the weights it was made of."""
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
def test_a_product_is_that_of_what_its_factors_stand_for(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    # Rows and outputs of very different size, which a single scale would drown.
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
def test_logits_are_near_float32(checkpoint: Path, plain_model: Any) -> None:
    model, _ = float8_model(checkpoint)
    sequences = random_ids([*range(2, 200, 5)], read_shape(checkpoint).vocab_size, seed=2)
    ours = model(pack(sequences, padding_idx=1, device=CPU)).tolist()
    theirs = plain_logits(plain_model, sequences)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.97
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= LOGIT_TOLERANCE[torch.float8_e4m3fn]


@needs_cpu_float8
@pytest.mark.slow
def test_the_order_of_a_real_models_ranking_is_kept(assets: Path) -> None:
    """Takes several minutes on a CPU."""
    check_on_cranfield(
        assets,
        lambda folder: load_runner(ScorerConfig(device="cpu"), folder, read_shape(folder)),
        lambda folder: Runner(float8_model(folder)[0], device=CPU, padding_idx=1, max_batch_tokens=2048),
    )


def test_no_matrix_is_kept_twice(checkpoint: Path) -> None:
    model, references = float8_model(checkpoint)
    kept = {name for name, reference in references.items() if reference() is not None}
    assert not [name for name in kept if name.endswith("dense.weight") and "encoder.layer" in name]
    assert "roberta.embeddings.word_embeddings.weight" in kept, "the embeddings stay as they are"
    assert model is not None


def test_selected_rows_keep_their_scales() -> None:
    values = torch.randn(5, 32) * torch.tensor([[1.0], [10], [100], [1000], [10000]])
    rows = Rows(values, PLAIN_OPS.quantize(values)).select(torch.tensor([3, 0], dtype=torch.int32))
    assert rows.quantized is not None
    assert torch.equal(rows.values, values[[3, 0]])
    torch.testing.assert_close(dequantize(rows.quantized), values[[3, 0]], rtol=1 / 16, atol=3)


def test_widths_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16.* 1000 and 4096"):
        check_float8(CPU, (1000, 4096))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_are_refused_in_the_config(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"needs a CUDA device.*8\.9.*'{device}'"):
        ScorerConfig(device=device, dtype="float8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_auto_that_comes_to_another_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        Scorer(checkpoint, dtype="float8")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        resolve_dtype(ScorerConfig(dtype="float8"), CPU)


def test_what_lies_between_products_is_in_bfloat16() -> None:
    assert activation_dtype(torch.float8_e4m3fn) is torch.bfloat16
    assert activation_dtype(torch.float16) is torch.float16
