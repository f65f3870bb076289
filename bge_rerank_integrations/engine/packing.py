"""Sequences laid end to end on a device, with nothing between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Seqlens:
    """Where each sequence of a packed batch lies.

    Attributes:
        lengths: Tokens of each of the B sequences, on the host.
        cu_seqlens: int32 [B + 1] on the device: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: The longest sequence.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int

    def runs(self) -> list[tuple[int, int]]:
        """Return neighbours of equal length as (number of sequences, length)."""
        return [(len(list(group)), length) for length, group in groupby(self.lengths)]

    def first_tokens(self) -> Seqlens:
        """Return the layout of the same sequences cut to their first token."""
        num_sequences = len(self.lengths)
        cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return Seqlens((1,) * num_sequences, cu_seqlens, 1)


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of T tokens in all.

    Attributes:
        ids: int32 [T] token ids. Rows beyond the last sequence, where there are any, belong to none.
        positions: int32 [T] rows of the position embedding, from `padding_idx + 1` in each sequence.
        seqlens: Where each sequence lies.
    """

    ids: Tensor
    positions: Tensor
    seqlens: Seqlens


def pack(
    sequences: Sequence[npt.NDArray[np.int32]],
    *,
    padding_idx: int,
    device: torch.device,
    num_rows: Callable[[int], int] = int,
    upload: Callable[[list[npt.NDArray[np.int32]]], Tensor] | None = None,
) -> PackedBatch:
    """Lay sequences end to end and bring them to the device in one copy.

    Args:
        sequences: int32 ids of each sequence; empty ones only to fill a batch up.
        padding_idx: The padding token's id, after which XLM-RoBERTa's positions begin.
        device: Where the tensors go.
        num_rows: How many rows to make of a number of tokens; the same number unless the device's linear
            layers want another.
        upload: How arrays get to the device, end to end; None is plainly.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    cu_seqlens = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    num_tokens = int(cu_seqlens[-1])
    starts = np.repeat(cu_seqlens[:-1], lengths)
    positions = np.arange(num_tokens, dtype=np.int32) - starts + np.int32(padding_idx + 1)
    total = num_rows(num_tokens)
    filling = np.full(total - num_tokens, padding_idx, dtype=np.int32)
    parts = [*sequences, filling, positions, filling, cu_seqlens]
    flat = torch.from_numpy(np.concatenate(parts)).to(device) if upload is None else upload(parts)
    ids, rows, cumulated = flat.split([total, total, len(cu_seqlens)])
    return PackedBatch(ids, rows, Seqlens(tuple(lengths.tolist()), cumulated, int(lengths.max())))
