"""From a checkpoint to a forward pass: the one place that puts precisions, kernels and threads together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.checkpoint import load_weights
from bge_rerank_integrations.engine.linear import resolve_linear
from bge_rerank_integrations.engine.model import EncoderShape, PackedCrossEncoder
from bge_rerank_integrations.engine.parallel import Forward, SplitForward
from bge_rerank_integrations.engine.vnni import require_int8

logger = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model on a device.

    Attributes:
        forward: Runs a batch.
        num_rows: How many rows it wants for a number of tokens.
    """

    forward: Forward
    num_rows: Callable[[int], int]


def build_model(
    folder: Path, shape: EncoderShape, *, device: torch.device, dtype: torch.dtype, num_threads: int | None
) -> Model:
    """Load a verified checkpoint and choose how it runs.

    Args:
        folder: The checkpoint.
        shape: Its shape.
        device: Where to.
        dtype: Precision of the encoder.
        num_threads: CPU threads to compute with; None is as many as torch is set to.

    Raises:
        CheckpointError: The weights cannot be used.
        DeviceError: The CPU has no int8 instructions.
        MissingExtraError: int8 is asked for and numba is not installed.
    """
    if dtype is torch.int8:
        require_int8(shape)
        # Here alone: nothing else needs numba, or pays for what it compiles.
        from bge_rerank_integrations.engine.int8 import Int8CrossEncoder

        weights = load_weights(folder, shape, device=device, dtype=dtype)
        model = Model(Int8CrossEncoder(shape, weights), int)
    else:
        linear = resolve_linear(device, dtype)
        attention = resolve_attention(device, dtype, shape.head_dim)
        weights = load_weights(folder, shape, device=device, dtype=dtype)
        encoder = PackedCrossEncoder(shape, weights, linear=linear.make, attention=attention)
        model = Model(encoder, linear.num_rows)
    if device.type != "cpu":
        return model
    return model._replace(forward=SplitForward(model.forward, num_threads or torch.get_num_threads()))
