"""Builds the forward pass of a checkpoint. This module alone decides how each precision runs.

docs/architecture.md has the steps to add a precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.blocks import Blocks, PlainBlocks
from bge_rerank_integrations.engine.checkpoint.weights import load_weights, verify_weights
from bge_rerank_integrations.engine.cpu.freed_memory import keep_freed_memory
from bge_rerank_integrations.engine.cpu.int8_support import is_faster_in_int8, require_int8
from bge_rerank_integrations.engine.cpu.parallel import Forward, SplitForward
from bge_rerank_integrations.engine.cpu.row_blocks import ROW_MULTIPLE, RowBlocks
from bge_rerank_integrations.engine.cuda.graphs import Graphs
from bge_rerank_integrations.engine.cuda.selection import (
    resolve_float8_blocks,
    resolve_fused_blocks,
    resolve_graphs,
)
from bge_rerank_integrations.engine.device import activation_dtype, resolve_num_threads, resolve_precision
from bge_rerank_integrations.engine.linear import onednn_linear, resolve_linear
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.packing import pack
from bge_rerank_integrations.engine.shape import EncoderShape
from bge_rerank_integrations.runtime.uninterrupted import import_uninterrupted

logger = logging.getLogger(__name__)

# Every checkpoint has this many positions, and a pass over so few tokens takes almost no time.
_FIRST_PASS_TOKENS: Final = 4


class ModelSpec(NamedTuple):
    """Everything that decides how a model is loaded and run.

    Attributes:
        folder: The folder of a verified checkpoint.
        shape: The shape of the checkpoint.
        config: The scorer's settings. Builders read from it the longest pair, the number of CPU threads and
            whether to capture CUDA graphs.
        device: The device that the model runs on.
        dtype: The precision of the encoder's matrix products.
        max_batch_tokens: Most tokens in one batch.
    """

    folder: Path
    shape: EncoderShape
    config: ScorerConfig
    device: torch.device
    dtype: torch.dtype
    max_batch_tokens: int


class Model(NamedTuple):
    """A model that is loaded onto a device.

    Attributes:
        forward: Runs a batch.
        row_multiple: Batches are padded to a multiple of this number of rows.
        graphs: Captures and replays batches; None where that is not supported.
    """

    forward: Forward
    row_multiple: int = 1
    graphs: Graphs | None = None


def build_model(spec: ModelSpec) -> Model:
    """Load a checkpoint, build its forward pass, and do all one-time work of the device.

    Raises:
        CheckpointError: The weights cannot be used.
        ConfigError: The precision does not support the model's widths.
        DeviceError: The device does not support the precision.
        MissingExtraError: The precision is int8 and numba is not installed.
    """
    reason = resolve_precision(spec.config, spec.device).reason
    logger.info("precision on %s: %s (%s)", spec.device, spec.dtype, reason)
    # This is quick. Kernels that are tried for other widths than those of the weights give misleading errors.
    verify_weights(spec.folder, spec.shape)
    if spec.device.type == "cpu" and find_spec("numba") is not None:
        import_uninterrupted("numba")
    model = _BUILDERS[spec.dtype](spec)
    if model.graphs is not None:
        model.graphs.capture()
    if spec.device.type != "cpu":
        return model
    keep_freed_memory()
    # Run one pass on this thread alone. In their first call, libraries initialize themselves, and compile and
    # load kernels. After this pass no request waits for that, and no two threads do it at the same time. The
    # module `first_calls` explains why two threads must not.
    padding_idx = spec.shape.padding_idx
    ids = np.full(_FIRST_PASS_TOKENS, padding_idx, np.int32)
    model.forward(pack([ids], padding_idx=padding_idx, device=spec.device, row_multiple=model.row_multiple))
    # Per token and layer, attention takes 4 * width * length operations and the matrix products take
    # 24 * width^2, at different speeds. The length at which both take the same time was measured at a width
    # of 768: 1,360 in int8 and 5,600 in float32 on an Intel processor; on an AMD one 2,200 to 3,700 in int8,
    # 1,500 in bfloat16 with `matmul_attention` and 3,400 with `bfloat16_tile_attention`, and in float32 1,100
    # with `sdpa_attention` and 4,000 to 8,000 with `tile_attention`. A wrong length makes the split uneven by
    # a few per cent at most.
    length_of_double_cost = (5 if spec.dtype is torch.float32 else 3) * spec.shape.hidden_size
    threads = resolve_num_threads(spec.config)
    return model._replace(
        forward=SplitForward(model.forward, threads, length_of_double_cost, model.row_multiple)
    )


def _build_floating(spec: ModelSpec) -> Model:
    """Build a model in float32, float16 or bfloat16."""
    linear = resolve_linear(spec.device, spec.dtype, resolve_num_threads(spec.config))
    if (spec.device.type, spec.dtype) == ("cpu", torch.bfloat16) and linear is not onednn_linear:
        logger.warning(
            "bfloat16 is much slower than float32 on this CPU, which has no instructions for it; use "
            "dtype='float32'%s",
            " or dtype='int8'" if is_faster_in_int8() else "",
        )
    if linear is onednn_linear:
        return _build_packed(spec, RowBlocks(PlainBlocks(linear)), ROW_MULTIPLE)
    blocks = resolve_fused_blocks(spec.device, spec.dtype, spec.shape) or PlainBlocks(linear)
    return _build_packed(spec, blocks)


def _build_float8(spec: ModelSpec) -> Model:
    """Build a model whose matrix products are in float8, for CUDA devices."""
    return _build_packed(spec, resolve_float8_blocks(spec.device, spec.shape))


def _build_int8(spec: ModelSpec) -> Model:
    """Build a model whose matrix products are in int8, for CPUs."""
    require_int8(spec.shape.head_dim)
    # Only int8 needs numba and the kernels that numba compiles when this module is imported.
    from bge_rerank_integrations.engine.cpu.int8_model import Int8CrossEncoder

    weights = load_weights(spec.folder, spec.shape, device=spec.device, dtype=spec.dtype)
    return Model(Int8CrossEncoder(spec.shape, weights))


def _build_packed(spec: ModelSpec, blocks: Blocks, row_multiple: int = 1) -> Model:
    """Build a `PackedCrossEncoder` from the layers of one precision.

    Args:
        spec: The model.
        blocks: Makes the layers.
        row_multiple: Inputs of the layers are padded to a multiple of this number of rows.
    """
    activations = activation_dtype(spec.dtype)
    attention = resolve_attention(spec.device, activations, spec.shape.head_dim)
    weights = load_weights(spec.folder, spec.shape, device=spec.device, dtype=activations)
    encoder = PackedCrossEncoder(
        spec.shape, weights, attention=attention, blocks=blocks, row_multiple=row_multiple
    )
    if not spec.config.capture_graphs:
        return Model(encoder, row_multiple)
    graphs = resolve_graphs(
        encoder, spec.device, attention, spec.shape, spec.config.max_length, spec.max_batch_tokens
    )
    return Model(encoder, row_multiple, graphs)


_BUILDERS: Final[Mapping[torch.dtype, Callable[[ModelSpec], Model]]] = {
    torch.float32: _build_floating,
    torch.float16: _build_floating,
    torch.bfloat16: _build_floating,
    torch.float8_e4m3fn: _build_float8,
    torch.int8: _build_int8,
}
