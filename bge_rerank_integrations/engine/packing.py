"""Packs sequences end to end on a device, without padding between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int32]
"""Token ids of a sequence, or other int32 values for the device."""


@dataclass(frozen=True)
class Seqlens:
    """The layout of the B sequences in a packed batch.

    Attributes:
        lengths: Number of tokens of each sequence, on the host.
        cu_seqlens: int32 [B + 1] on the device. Sequence i takes the rows from cu_seqlens[i] up to, but not
            including, cu_seqlens[i + 1].
        max_seqlen: Upper bound of the lengths, in tokens.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int

    def runs(self) -> list[tuple[int, int]]:
        """Return each run of neighbouring sequences of equal length as (number of sequences, length)."""
        return [(len(list(group)), length) for length, group in groupby(self.lengths)]

    def first_tokens(self) -> Seqlens:
        """Return the layout of the same sequences, each cut to its first token."""
        num_sequences = len(self.lengths)
        cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return Seqlens((1,) * num_sequences, cu_seqlens, 1)


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in T rows, one row per token.

    Attributes:
        ids: int32 [T] token ids. Rows after the last sequence are padding.
        positions: int32 [T] position ids, which start at `padding_idx + 1` in each sequence.
        seqlens: The layout of the sequences.
    """

    ids: Tensor
    positions: Tensor
    seqlens: Seqlens


def pack(
    sequences: Sequence[IntArray],
    *,
    padding_idx: int,
    device: torch.device,
    row_multiple: int = 1,
    upload: Callable[[list[IntArray]], Tensor] | None = None,
) -> PackedBatch:
    """Lay sequences end to end and copy them to the device in one transfer.

    Args:
        sequences: int32 token ids of each sequence. Only sequences that pad a batch may be empty.
        padding_idx: Id of the padding token. XLM-RoBERTa's position ids start at `padding_idx + 1`.
        device: The device of the result.
        row_multiple: The batch is padded to a multiple of this number of rows.
        upload: Concatenates int32 arrays and copies them to the device; None for an ordinary copy.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    cu_seqlens = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    num_tokens = int(cu_seqlens[-1])
    starts = np.repeat(cu_seqlens[:-1], lengths)
    positions = np.arange(num_tokens, dtype=np.int32) - starts + np.int32(padding_idx + 1)
    filling = np.full(-num_tokens % row_multiple, padding_idx, dtype=np.int32)
    parts = [*sequences, filling, positions, filling, cu_seqlens]
    flat = torch.from_numpy(np.concatenate(parts)).to(device) if upload is None else upload(parts)
    num_rows = num_tokens + len(filling)
    ids, rows, cumulated = flat.split([num_rows, num_rows, len(cu_seqlens)])
    return PackedBatch(ids, rows, Seqlens(tuple(lengths.tolist()), cumulated, int(lengths.max())))
