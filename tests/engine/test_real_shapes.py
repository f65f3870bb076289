"""The shapes of the BGE rerankers with random weights, compared with transformers."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.runner import load_runner
from examples.random_checkpoint import build_random_checkpoint
from tests.support.engine import max_difference, plain_logits, random_ids, score_all
from tests.support.plain_model import load_plain_model
from tests.support.tolerances import LOGIT_TOLERANCE

# Number of layers, width, heads, feed-forward width, positions, and the lengths to compare.
SHAPES = {
    "bge-reranker-base": (12, 768, 12, 3072, 514, [5, 64, 300, 512]),
    "bge-reranker-large": (24, 1024, 16, 4096, 514, [5, 64, 300, 512]),
    "bge-reranker-v2-m3": (24, 1024, 16, 4096, 8194, [5, 512, 2500]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_match_transformers(name: str, tmp_path: Path) -> None:
    num_layers, width, num_heads, inner, positions, lengths = SHAPES[name]
    folder = build_random_checkpoint(
        tmp_path,
        num_layers=num_layers,
        hidden_size=width,
        num_heads=num_heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        vocab_size=250002,
    )
    shape = read_shape(folder)
    assert shape.max_length == positions - 2
    sequences = random_ids(lengths, shape.vocab_size)
    model = load_plain_model(folder)
    theirs = plain_logits(model, sequences)
    del model
    gc.collect()
    runner = load_runner(ScorerConfig(device="cpu", dtype="float32", max_length=max(lengths)), folder, shape)
    # Rounding errors grow with layers and width. The bound for these shapes is 1e-4.
    assert max_difference(score_all(runner, sequences), theirs) <= 10 * LOGIT_TOLERANCE[torch.float32]
