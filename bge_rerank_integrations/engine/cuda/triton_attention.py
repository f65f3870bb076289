"""Attention within each sequence of a packed batch, in one Triton kernel. It is tried before it is used.

A program computes the output of one head for a block of queries of one sequence. It goes through the keys of
that sequence once, and keeps the largest score, the sum of the weights and the weighted sum of the values.
FlashAttention describes the method: https://arxiv.org/abs/2205.14135. The order of all sums depends only on
the lengths of the sequence, so a sequence gets the same result in every batch.

Triton compiles no new kernel for other lengths, other numbers of sequences or heads, or another layout of the
rows, as long as rows start at multiples of 16 elements.
"""

# Without `from __future__ import annotations`, since Triton reads the annotations at run time.
import torch
import triton
import triton.language as tl
from torch import Tensor

# Queries and keys in a block. On an H200, these sizes were the fastest of eight for sequences of 512 tokens,
# of 128 tokens and of mixed lengths.
_BLOCK_QUERIES, _BLOCK_KEYS = 64, 64
_NUM_WARPS, _NUM_STAGES = 4, 3
_LOG2_E = 1.4426950408889634


def attend(q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, kv_bounds: Tensor, max_queries: int) -> Tensor:
    """Compute softmax attention, scaled by the square root of the head dimension.

    Args:
        q: Queries [Tq, heads, head_dim]. The heads of a row lie next to each other.
        k: Keys [Tkv, heads, head_dim], likewise.
        v: Values, with the layout of the keys.
        q_bounds: int32 [B + 1]. The queries of sequence i are the rows from `q_bounds[i]` up to, but not
            including, `q_bounds[i + 1]`.
        kv_bounds: int32 [B + 1], likewise for keys and values.
        max_queries: Upper bound of the number of queries of a sequence.

    Returns:
        [Tq, heads, head_dim], contiguous. Rows that belong to no sequence are not written.
    """
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty(num_rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    num_blocks = triton.cdiv(max_queries, _BLOCK_QUERIES)
    grid = (num_blocks * (len(q_bounds) - 1), num_heads)
    _attend[grid](
        q, k, v, out, q_bounds, kv_bounds, num_blocks, q.stride(0), k.stride(0), out.stride(0),
        head_dim, head_dim**-0.5 * _LOG2_E, _BLOCK_QUERIES, _BLOCK_KEYS,
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
        enable_fp_fusion=True,  # a product and a sum become one instruction; Triton 3.10 changes the default
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["q_bounds", "kv_bounds"])
def _attend(
    q,
    k,
    v,
    out,
    q_bounds,
    kv_bounds,
    num_blocks,
    q_stride,
    kv_stride,
    out_stride,
    head_dim: tl.constexpr,
    scale: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
):
    sequence, head = tl.program_id(0) // num_blocks, tl.program_id(1)
    # 64 bits, because a large batch has more elements than 32 bits can index. A sequence has fewer.
    q_start = tl.load(q_bounds + sequence).to(tl.int64)
    num_queries = (tl.load(q_bounds + sequence + 1) - q_start).to(tl.int32)
    first = tl.program_id(0) % num_blocks * block_queries
    if first < num_queries:
        kv_start = tl.load(kv_bounds + sequence).to(tl.int64)
        num_keys = (tl.load(kv_bounds + sequence + 1) - kv_start).to(tl.int32)
        columns = tl.arange(0, head_dim)
        rows = first + tl.arange(0, block_queries)
        is_query = (rows < num_queries)[:, None]
        queries = tl.load(
            q + q_start * q_stride + head * head_dim + rows[:, None] * q_stride + columns[None, :],
            mask=is_query,
            other=0.0,
        )
        keys = tl.arange(0, block_keys)
        first_key = kv_start * kv_stride + head * head_dim
        k_block = k + first_key + keys[None, :] * kv_stride + columns[:, None]
        v_block = v + first_key + keys[:, None] * kv_stride + columns[None, :]
        peak = tl.full((block_queries,), float("-inf"), tl.float32)
        total = tl.zeros((block_queries,), tl.float32)
        sums = tl.zeros((block_queries, head_dim), tl.float32)
        # All blocks but the last are full and need no mask.
        num_full = num_keys // block_keys * block_keys
        for start in range(0, num_full, block_keys):
            offset = start * kv_stride
            scores = tl.dot(queries, tl.load(k_block + offset), input_precision="ieee")
            values = tl.load(v_block + offset)
            peak, total, sums = _add_block(scores, values, peak, total, sums, scale)
        if num_full < num_keys:
            offset = num_full * kv_stride
            is_key = num_full + keys < num_keys
            # Rows of the next sequence are not read: a value that is not finite would spoil this sequence.
            block = tl.load(k_block + offset, mask=is_key[None, :], other=0.0)
            scores = tl.dot(queries, block, input_precision="ieee")
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            values = tl.load(v_block + offset, mask=is_key[:, None], other=0.0)
            peak, total, sums = _add_block(scores, values, peak, total, sums, scale)
        tl.store(
            out + q_start * out_stride + head * head_dim + rows[:, None] * out_stride + columns[None, :],
            sums / total[:, None],
            mask=is_query,
        )


@triton.jit
def _add_block(scores, values, peak, total, sums, scale: tl.constexpr):
    """Add a block of keys and values. The weight of a key is two to the power of its scaled score."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - new_peak[:, None])
    shrink = tl.math.exp2(peak - new_peak)
    sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
    return new_peak, total * shrink + tl.sum(weights, 1), sums
