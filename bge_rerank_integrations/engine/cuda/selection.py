"""What a CUDA device runs a model with beyond torch's own operators, and when it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bge_rerank_integrations.engine.attention import VarlenAttention
from bge_rerank_integrations.engine.blocks import Blocks
from bge_rerank_integrations.engine.cuda.float8 import Float8Blocks, check_float8
from bge_rerank_integrations.engine.cuda.fused_ops import FusedBlocks, resolve_fused
from bge_rerank_integrations.engine.cuda.graphs import CudaCapture, Graphs, can_capture, plan_buckets
from bge_rerank_integrations.engine.device import activation_dtype
from bge_rerank_integrations.engine.model import EncoderShape
from bge_rerank_integrations.engine.packing import PackedBatch

logger = logging.getLogger(__name__)


def resolve_blocks(device: torch.device, dtype: torch.dtype, shape: EncoderShape) -> Blocks | None:
    """Choose what a model's layers are made of; None is torch's own operators.

    Raises:
        ConfigError: The model's widths do not go with the precision.
        DeviceError: torch, as it is here, cannot compute in it on this device.
    """
    widths = shape.hidden_size, shape.intermediate_size
    is_float8 = dtype is torch.float8_e4m3fn
    if is_float8:
        check_float8(device, widths)
    ops = resolve_fused(device, activation_dtype(dtype), widths, quantizing=is_float8)
    if is_float8:
        logger.info("products of the encoder on %s: float8, scaled by row", device)
        return Float8Blocks(ops)
    return None if ops.is_plain else FusedBlocks(ops)


def resolve_graphs(
    forward: Callable[[PackedBatch], Tensor],
    device: torch.device,
    attention: VarlenAttention,
    shape: EncoderShape,
    max_length: int,
    max_batch_tokens: int,
) -> Graphs | None:
    """Return what can capture a model's small batches, or None where nothing can."""
    if not can_capture(device, attention):
        return None
    # What fills a batch up is cut into sequences of this length, and there is no room for many.
    longest = max(max_length, min(shape.max_length, 128))
    return Graphs(
        forward,
        device=device,
        padding_idx=shape.padding_idx,
        buckets=plan_buckets(longest, max_batch_tokens),
        capture=CudaCapture(device),
    )
