"""Attention out of torch's ordinary operators: one call for all neighbouring sequences of equal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.packing import Seqlens
from bge_rerank_integrations.engine.padded_rows import round_up_rows

# Most attention scores in one matrix product for each thread that computes it. In bfloat16 they take 2 MB, so
# that they stay in the cache of a core until the softmax and the second product have read them.
_MAX_SCORES = 1 << 20
# The same for `product_attention`, which also runs on devices other than CPUs, where each call takes long.
_MAX_PLAIN_SCORES = 1 << 23
# Most sequences in one matrix product. A larger number would only save a few calls.
_MAX_SEQUENCES: Final = 16


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run `scaled_dot_product_attention` on each run of sequences of equal length."""
    return _attend_runs(_attend_fused, q, k, v, q_seqlens, kv_seqlens)


def contiguous_sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens
) -> Tensor:
    """Run `scaled_dot_product_attention` on contiguous copies of each run of sequences of equal length.

    For a single query per sequence, Metal kernels of several releases of torch assume contiguous keys and
    values, and silently read the wrong rows of others. See https://github.com/pytorch/pytorch/issues/181133.
    """
    return _attend_runs(_attend_contiguous, q, k, v, q_seqlens, kv_seqlens)


def product_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run matrix products and a softmax in float32 on each run of sequences of equal length."""
    return _attend_runs(_attend_plainly, q, k, v, q_seqlens, kv_seqlens)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Seqlens, kv_seqlens: Seqlens) -> Tensor:
    """Run batched matrix products and a softmax. In bfloat16 on CPUs, torch's fused kernel is slower.

    oneDNN compiles a kernel of half a megabyte for each shape of a matrix product, and keeps it. To limit the
    number of shapes to a few hundred, this function rounds lengths up, and splits a run of sequences of equal
    length into parts of few sizes.
    """
    if q_seqlens.max_seqlen == 1:
        # With one query per sequence there is little work, and torch computes float32 without oneDNN.
        q32, k32, v32 = q.float(), k.float(), v.float()
        return sdpa_attention(q32, k32, v32, q_seqlens, kv_seqlens).to(q.dtype)
    return _attend_runs(_attend_by_products, q, k, v, q_seqlens, kv_seqlens)


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


def _attend_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # `scaled_dot_product_attention` would call the same operator on CPUs. But it fails where the application
    # has limited the kernels of the whole process with `torch.nn.attention.sdpa_kernel`, for a GPU.
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return attended


def _attend_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys, values = (rows.float().contiguous() for rows in (q, k, v))
    num_queries = max(_MAX_PLAIN_SCORES // (len(k) * k.shape[1] * k.shape[2]), 1)
    parts = (queries * q.shape[-1] ** -0.5).split(num_queries, 2)
    attended = [torch.softmax(part @ keys.transpose(2, 3), -1) @ values for part in parts]
    return torch.cat(attended, 2).to(q.dtype)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention on [sequences, heads, length, head_dim], with as many queries as keys."""
    num_sequences, num_heads, length, head_dim = k.shape
    padded, max_scores = round_up_rows(length), _MAX_SCORES * torch.get_num_threads()
    attended = q.new_empty(num_sequences, length, num_heads, head_dim).transpose(1, 2)
    for part in _parts(num_sequences, num_heads, padded, max_scores):
        # Copy only the rows of this part. They are still in the cache when the products read them.
        queries, keys, values = (_copy_rows(rows[part], padded) for rows in (q, k, v))
        queries *= head_dim**-0.5
        columns = keys.transpose(1, 2)
        results = []
        for rows in _row_slices(len(keys), padded, max_scores):
            scores = torch.bmm(queries[:, rows], columns)
            if padded > length:
                scores[..., length:] = -torch.inf
            results.append(torch.bmm(torch.softmax(scores, -1), values))
        result = results[0] if len(results) == 1 else torch.cat(results, 1)
        attended[part] = result.unflatten(0, attended[part].shape[:2])[:, :, :length]
    return attended


def _copy_rows(rows: Tensor, length: int) -> Tensor:
    """Copy the rows of each head next to each other: products of strided rows are several times slower.

    Args:
        rows: [sequences, heads, rows, head_dim].
        length: Number of rows to pad to, with zeros.

    Returns:
        [sequences * heads, length, head_dim].
    """
    copies = rows.new_empty(*rows.shape[:2], length, rows.shape[3])
    copies[:, :, : rows.shape[2]] = rows
    copies[:, :, rows.shape[2] :] = 0
    return copies.flatten(0, 1)


def _parts(num_sequences: int, num_heads: int, length: int, max_scores: int) -> Iterator[tuple[slice, slice]]:
    """Divide the heads of several sequences into parts of at most `max_scores` scores, or of one head.

    Yields:
        A slice of the sequences and one of the heads. A part is either all heads of a power of two of
        sequences, or a divisor of the heads of one sequence, so that parts have few shapes.
    """
    most = max(max_scores // length**2, 1)
    if most < num_heads:
        size = max(divisor for divisor in range(1, most + 1) if num_heads % divisor == 0)
        for sequence, head in product(range(num_sequences), range(0, num_heads, size)):
            yield slice(sequence, sequence + 1), slice(head, head + size)
        return
    largest = min(_floor_to_power_of_2(most // num_heads), _MAX_SEQUENCES)
    start = 0
    while start < num_sequences:
        size = min(largest, _floor_to_power_of_2(num_sequences - start))
        yield slice(start, start + size), slice(0, num_heads)
        start += size


def _row_slices(num_heads: int, length: int, max_scores: int) -> Iterator[slice]:
    """Divide the queries of a part of heads into slices of at most `max_scores` scores, or of one query."""
    size = _floor_to_power_of_2(max(max_scores // (num_heads * length), 1))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _floor_to_power_of_2(number: int) -> int:
    return 1 << (number.bit_length() - 1)
