"""Compares an attention implementation with plain attention in float64, before a model uses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from bge_rerank_integrations.engine.current_device import on_device
from bge_rerank_integrations.engine.packing import Seqlens

# One sequence is longer than a block of 128 rows, one fills a block of 64 rows, and three neighbours have the
# same length.
_LENGTHS: Final = (200, 64, 33, 33, 33, 5, 1)
# CUDA graphs pad a batch with empty sequences, and their longest sequence is only an upper bound.
_LENGTHS_IN_GRAPHS: Final = (200, 64, 33, 33, 33, 5, 0, 1)
_MAX_SEQLEN_IN_GRAPHS: Final = 512
_NUM_HEADS: Final = 2
# Largest absolute difference of an output. Outputs are weighted means of values with a standard deviation of
# 1, so a kernel that reads a wrong row is off by far more. The rounding of inputs does not count, because the
# exact result is computed from rounded inputs. For float32, a user may permit products in TF32, which has as
# many bits of mantissa as float16.
_TOLERANCE: Final = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@torch.inference_mode()
def try_attention(
    attention: Callable[[Tensor, Tensor, Tensor, Seqlens, Seqlens], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    works_in_graphs: bool,
) -> None:
    """Run an implementation in both ways that the model does, and compare the results with exact ones.

    All layers but the last compute every token of a sequence. The last layer has one query per sequence. The
    tensors are views into the output of one projection, as they are in the model.

    Args:
        attention: The implementation, with the arguments of `VarlenAttention`.
        device: The device to run on.
        dtype: The precision of the inputs.
        head_dim: The width of a head.
        works_in_graphs: Whether a CUDA graph can capture the implementation. Then it also has to support
            empty sequences, and a longest sequence that is only an upper bound.

    Raises:
        AssertionError: The results differ by more than rounding errors.
        Exception: The implementation failed.
    """
    lengths = _LENGTHS_IN_GRAPHS if works_in_graphs else _LENGTHS
    bounds = [sum(lengths[:end]) for end in range(len(lengths) + 1)]
    generator = torch.Generator().manual_seed(0)

    def random(num_rows: int, num_parts: int) -> tuple[Tensor, ...]:
        rows = torch.randn(
            num_rows, num_parts, _NUM_HEADS, head_dim, dtype=torch.float32, generator=generator
        )
        return rows.to(device, dtype).unbind(1)

    with on_device(device):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        seqlens = Seqlens(lengths, cu_seqlens, _MAX_SEQLEN_IN_GRAPHS if works_in_graphs else max(lengths))
        q, k, v = random(bounds[-1], 3)
        _compare(attention(q, k, v, seqlens, seqlens), q, k, v, bounds, bounds)
        (q,), (k, v) = random(len(lengths), 1), random(bounds[-1], 2)
        result = attention(q, k, v, seqlens.first_tokens(), seqlens)
        _compare(result, q, k, v, list(range(len(lengths) + 1)), bounds)


def _compare(
    result: Tensor, q: Tensor, k: Tensor, v: Tensor, q_bounds: list[int], kv_bounds: list[int]
) -> None:
    if (result.shape, result.dtype) != (q.shape, q.dtype):
        raise AssertionError(f"the result has shape {tuple(result.shape)} and type {result.dtype}")
    # NumPy computes the exact result. On the device, a setting of torch may reduce the precision of products,
    # and torch would share these small products between all cores of a CPU that may be busy.
    ours, q64, k64, v64 = (tensor.cpu().double().numpy() for tensor in (result, q, k, v))
    difference = 0.0
    for index in range(len(kv_bounds) - 1):
        rows = slice(q_bounds[index], q_bounds[index + 1])
        columns = slice(kv_bounds[index], kv_bounds[index + 1])
        if kv_bounds[index] == kv_bounds[index + 1]:
            continue  # nothing reads the result of an empty sequence
        scores = np.einsum("qhd,khd->hqk", q64[rows], k64[columns]) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        exact = np.einsum("hqk,khd->qhd", weights, v64[columns])
        # Count NaN as an infinite difference, since no comparison with NaN is true.
        difference = max(difference, np.nan_to_num(np.abs(ours[rows] - exact), nan=math.inf).max())
    tolerance = _TOLERANCE[result.dtype]
    if difference > tolerance:
        raise AssertionError(f"results differ by {difference:.2g}, more than {tolerance:.2g}")
