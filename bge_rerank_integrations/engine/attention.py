"""Attention within each sequence of a packed batch. All implementations share one signature."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.linear import round_up_rows
from bge_rerank_integrations.engine.packing import Seqlens

logger = logging.getLogger(__name__)

_VARLEN_CAPABILITY = (8, 0)  # torch.nn.attention.varlen calls FlashAttention, which needs Ampere or later
_VARLEN_MAX_HEAD_DIM = 256
# Most attention scores in one matrix product. 16 MB of scores stay in a processor's cache, and only sequences
# of thousands of tokens have more.
_MAX_SCORES = 1 << 23
# Most sequences in one matrix product. A larger number would only save a few calls.
_MAX_PART: Final = 16


class VarlenAttention(Protocol):
    """Bidirectional softmax attention, scaled by the square root of the head dimension."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
        """Compute attention from each query row to the key rows of its own sequence.

        Args:
            q: Queries [Tq, heads, head_dim]. The output for rows after the last sequence is zero or any other
                finite value.
            k: Keys [Tkv, heads, head_dim].
            v: Values [Tkv, heads, head_dim].
            q_seqlens: The layout of the B sequences in `q`.
            kv_seqlens: The layout of the same B sequences in `k` and `v`.

        Returns:
            [Tq, heads, head_dim], contiguous.
        """


def resolve_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> VarlenAttention:
    """Choose the attention implementation for a device and a precision, and log the choice."""
    attention: VarlenAttention = sdpa_attention
    if _has_varlen_kernel(device, dtype, head_dim):
        attention = flash_attention
    elif device.type == "cpu" and dtype is torch.bfloat16:
        attention = matmul_attention
    logger.info("attention on %s in %s: %s", device, dtype, getattr(attention, "__name__", attention))
    return attention


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run `scaled_dot_product_attention` on each run of sequences of equal length; works on every device."""
    return _attend_runs(F.scaled_dot_product_attention, q, k, v, q_seqlens, kv_seqlens)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run batched matrix products and a softmax; in bfloat16 on CPUs, faster than torch's fused kernel.

    oneDNN compiles a kernel of half a megabyte for each shape of a matrix product, and keeps it. To limit the
    number of shapes to a few hundred, this function rounds lengths up, and splits a run of sequences of equal
    length into parts whose sizes are powers of two.
    """
    if q_seqlens.max_seqlen == 1:
        # With one query per sequence there is little work, and torch computes float32 without oneDNN.
        q32, k32, v32 = q.float(), k.float(), v.float()
        return sdpa_attention(q32, k32, v32, q_seqlens, kv_seqlens).to(q.dtype)
    return _attend_runs(_attend_by_products, q, k, v, q_seqlens, kv_seqlens)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run `torch.nn.attention.varlen`, one kernel for the whole batch."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        q,
        k,
        v,
        q_seqlens.cu_seqlens,
        kv_seqlens.cu_seqlens,
        q_seqlens.max_seqlen,
        kv_seqlens.max_seqlen,
    )
    assert isinstance(attended, Tensor)  # it is a tuple only with auxiliary outputs
    return attended


def _attend_runs(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_seqlens: Seqlens,
    kv_seqlens: Seqlens,
) -> Tensor:
    """Apply `attend` to each run of sequences of equal length, as [sequences, heads, length, head_dim]."""
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    output[sum(q_seqlens.lengths) :].zero_()
    q_start = kv_start = sequence = 0
    for count, kv_length in kv_seqlens.runs():
        # All sequences of a run have the same query length too: either the key length, or 1.
        q_length = q_seqlens.lengths[sequence]
        q_end, kv_end = q_start + count * q_length, kv_start + count * kv_length
        attended = attend(
            *(
                rows.unflatten(0, (count, -1)).transpose(1, 2)
                for rows in (q[q_start:q_end], k[kv_start:kv_end], v[kv_start:kv_end])
            )
        )
        output[q_start:q_end].unflatten(0, (count, -1)).copy_(attended.transpose(1, 2))
        q_start, kv_start, sequence = q_end, kv_end, sequence + count
    return output


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention on [sequences, heads, length, head_dim], with as many queries as keys."""
    parts = zip(*(rows.split(_part_sizes(len(q))) for rows in (q, k, v)), strict=True)
    attended = [_attend_part(*part) for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _part_sizes(count: int) -> list[int]:
    """Return powers of two that add up to `count`, largest first."""
    sizes = [_MAX_PART] * (count // _MAX_PART)
    return sizes + [
        1 << bit for bit in range(_MAX_PART.bit_length() - 1, -1, -1) if count % _MAX_PART >> bit & 1
    ]


def _attend_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape, length = k.shape[:2], k.shape[2]
    missing = round_up_rows(length) - length
    # Copy the rows of each head next to each other: products of strided rows are several times slower.
    q, k, v = (
        (F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()).flatten(0, 1)
        for rows in (q, k, v)
    )
    scaled, keys = q * q.shape[-1] ** -0.5, k.transpose(1, 2)
    rows = max(_MAX_SCORES // (len(scaled) * keys.shape[-1]), 1)
    parts = []
    for part in scaled.split(rows, 1):
        scores = torch.bmm(part, keys)
        if missing:
            scores[..., length:] = -torch.inf
        parts.append(torch.bmm(torch.softmax(scores, -1), v))
    attended: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return attended.view(*shape, *attended.shape[1:])[:, :, :length]


def _has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if head_dim > _VARLEN_MAX_HEAD_DIM or torch.version.hip is not None:
        return False
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _VARLEN_CAPABILITY
