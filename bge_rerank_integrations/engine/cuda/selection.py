"""Decides when CUDA devices run fused kernels, float8 and CUDA graphs instead of torch's own operators."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bge_rerank_integrations.engine.attention import VarlenAttention
from bge_rerank_integrations.engine.blocks import Blocks
from bge_rerank_integrations.engine.cuda.float8 import Float8Blocks, check_float8
from bge_rerank_integrations.engine.cuda.fused_ops import FusedBlocks, resolve_fused
from bge_rerank_integrations.engine.cuda.graphs import (
    CudaCapture,
    Graphs,
    can_capture,
    measure_launch,
    plan_buckets,
)
from bge_rerank_integrations.engine.device import activation_dtype
from bge_rerank_integrations.engine.packing import PackedBatch
from bge_rerank_integrations.engine.shape import EncoderShape

logger = logging.getLogger(__name__)


def resolve_fused_blocks(device: torch.device, dtype: torch.dtype, shape: EncoderShape) -> Blocks | None:
    """Return layers with fused kernels; None where the device or this installation cannot run them."""
    ops = resolve_fused(device, dtype, (shape.hidden_size, shape.intermediate_size), quantizing=False)
    return None if ops.is_plain else FusedBlocks(ops)


def resolve_float8_blocks(device: torch.device, shape: EncoderShape) -> Blocks:
    """Return layers whose matrix products are in float8.

    Raises:
        ConfigError: float8 does not support the model's widths.
        DeviceError: The installed torch cannot multiply in float8 on this device.
    """
    widths = shape.hidden_size, shape.intermediate_size
    check_float8(device, widths)
    ops = resolve_fused(device, activation_dtype(torch.float8_e4m3fn), widths, quantizing=True)
    logger.info("matrix products of the encoder on %s: float8, scaled by row", device)
    return Float8Blocks(ops)


def resolve_graphs(
    forward: Callable[[PackedBatch], Tensor],
    device: torch.device,
    attention: VarlenAttention,
    shape: EncoderShape,
    max_length: int,
    max_batch_tokens: int,
) -> Graphs | None:
    """Return the CUDA graphs for a model's batches; None where they cannot be captured."""
    if not can_capture(device, attention):
        return None
    # Padding is cut into sequences of this length. A short length would make more sequences than fit into a
    # bucket.
    longest = max(max_length, min(shape.max_length, 128))
    return Graphs(
        forward,
        device=device,
        padding_idx=shape.padding_idx,
        buckets=plan_buckets(longest, max_batch_tokens),
        capture=CudaCapture(device),
        measure=measure_launch,
    )
