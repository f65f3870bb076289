"""From a checkpoint to a forward pass: the one place that puts precisions, kernels and threads together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cpu.int8_support import require_int8
from bge_rerank_integrations.engine.cpu.parallel import Forward, SplitForward
from bge_rerank_integrations.engine.cuda.graphs import Graphs
from bge_rerank_integrations.engine.cuda.selection import resolve_blocks, resolve_graphs
from bge_rerank_integrations.engine.device import activation_dtype, resolve_num_threads
from bge_rerank_integrations.engine.linear import resolve_linear
from bge_rerank_integrations.engine.model import EncoderShape, PackedCrossEncoder
from bge_rerank_integrations.engine.packing import pack

# Few enough for every checkpoint's positions and for the pass to take no time to speak of.
_FIRST_PASS_TOKENS: Final = 4


class Model(NamedTuple):
    """A model on a device.

    Attributes:
        forward: Runs a batch.
        num_rows: How many rows it wants for a number of tokens.
        graphs: What can capture its small batches, where anything can.
    """

    forward: Forward
    num_rows: Callable[[int], int]
    graphs: Graphs | None = None


def build_model(
    folder: Path,
    shape: EncoderShape,
    config: ScorerConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_batch_tokens: int,
) -> Model:
    """Load a verified checkpoint and choose how it runs.

    Args:
        folder: The checkpoint.
        shape: Its shape.
        config: How long pairs may be, and how many threads may compute.
        device: Where to.
        dtype: Precision of the encoder's products.
        max_batch_tokens: Most tokens of a batch.

    Raises:
        CheckpointError: The weights cannot be used.
        ConfigError: The model's widths do not go with the precision.
        DeviceError: The device has no arithmetic for the precision.
        MissingExtraError: int8 is asked for and numba is not installed.
    """
    if dtype is torch.int8:
        require_int8(shape.head_dim)
        # Here alone: nothing else needs numba, or pays for what it compiles.
        from bge_rerank_integrations.engine.cpu.int8_model import Int8CrossEncoder

        weights = load_weights(folder, shape, device=device, dtype=dtype)
        model = Model(Int8CrossEncoder(shape, weights), int)
    else:
        activations = activation_dtype(dtype)
        linear = resolve_linear(device, dtype)
        attention = resolve_attention(device, activations, shape.head_dim)
        blocks = resolve_blocks(device, dtype, shape)
        weights = load_weights(folder, shape, device=device, dtype=activations)
        encoder = PackedCrossEncoder(
            shape,
            weights,
            linear=linear.make,
            num_rows=linear.num_rows,
            attention=attention,
            blocks=blocks,
        )
        graphs = resolve_graphs(encoder, device, attention, shape, config.max_length, max_batch_tokens)
        model = Model(encoder, linear.num_rows, graphs)
    if device.type != "cpu":
        return model
    # One pass on this thread alone. In their first call libraries set up what they need, and compile and load
    # kernels. No request waits for that now, and no two threads do it at once; `first_calls` says why.
    ids = np.full(_FIRST_PASS_TOKENS, shape.padding_idx, np.int32)
    model.forward(pack([ids], padding_idx=shape.padding_idx, device=device, num_rows=model.num_rows))
    # Attention is 4 * width * length operations a token and layer, products 24 * width^2, not equally fast.
    # Measured at a width of 768: 1,360 in int8 and 5,600 in float32 on an Intel processor, about 1,650 in
    # bfloat16 and 1,100 in float32 on an AMD one. An error here costs a few per cent of balance, no more.
    length_of_double_cost = (3 if dtype is torch.float32 else 2) * shape.hidden_size
    threads = resolve_num_threads(config)
    return model._replace(forward=SplitForward(model.forward, threads, length_of_double_cost, model.num_rows))
