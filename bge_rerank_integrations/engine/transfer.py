"""Ids to the device and logits back from it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int32]

_NUM_SLOTS: Final = 2


class Transfer(Protocol):
    """A way to and from a device, used by one thread at a time but for what `download` returns.

    Attributes:
        depth: How many batches may be under way at once.
    """

    depth: int

    def upload(self, parts: Sequence[IntArray]) -> Tensor:
        """Lay int32 arrays end to end on the device."""

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        """Begin to fetch logits [B], and return what waits for them."""


def resolve_transfer(device: torch.device, max_tokens: int) -> Transfer:
    """Choose how to copy.

    Args:
        device: To where and from where.
        max_tokens: Of one batch; one that has more is copied plainly.
    """
    if device.type == "cuda":
        try:
            return PinnedTransfer(device, max_tokens)
        except RuntimeError as error:  # some systems limit the memory that may be pinned
            logger.info("copies to %s from memory that is not pinned: %s", device, type(error).__name__)
    return PlainTransfer(device)


class PlainTransfer:
    """Copies that have ended when the call returns; one batch at a time.

    Args:
        device: To where and from where.
    """

    depth = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def upload(self, parts: Sequence[IntArray]) -> Tensor:
        """See `Transfer`."""
        return torch.from_numpy(np.concatenate(parts)).to(self._device)

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        """See `Transfer`."""
        values: list[float] = logits.tolist()
        return lambda: values


class PinnedTransfer:
    """Copies to and from a CUDA device that neither wait for it nor make it wait.

    Uploads have a stream of their own, so that the next batch's goes while this one's products run: on the
    stream that computes it would come after them. They leave from one of two pinned buffers in turn, laid
    out there directly, and a buffer is written anew only when the copy before has left it. All that is
    pinned for uploads is pinned here, once.

    A download goes on the stream that computes, so it comes after the forward pass and before the next one,
    which may write into the same memory (a CUDA graph does). To wait for it is to wait for an event behind
    it, not for the stream, where the next batch may be computing already. torch fetches into pinned memory,
    which it keeps for the next time, when a copy to the host is asked not to block.

    Args:
        device: To where and from where.
        max_tokens: Of one batch; one that has more is copied plainly.

    Raises:
        RuntimeError: No memory can be pinned.
    """

    depth = 2

    def __init__(self, device: torch.device, max_tokens: int) -> None:
        self._device = device
        self._plain = PlainTransfer(device)
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            # Ids, positions, and bounds of sequences, of which there are no more than tokens.
            self._slots = deque(_Slot(3 * max_tokens + 1) for _ in range(_NUM_SLOTS))

    def upload(self, parts: Sequence[IntArray]) -> Tensor:
        """See `Transfer`."""
        size = sum(map(len, parts))
        slot = self._slots[0]
        if size > len(slot.array):
            return self._plain.upload(parts)
        self._slots.rotate()
        slot.has_left.synchronize()  # one that was never recorded has
        np.concatenate(parts, out=slot.array[:size])
        with torch.cuda.stream(self._stream):
            uploaded = slot.tensor[:size].to(self._device, non_blocking=True)
            slot.has_left.record()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(slot.has_left)
        # It was allocated for the stream of uploads, which must not have the memory back before the other
        # is done with it.
        uploaded.record_stream(computing)
        return uploaded

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        """See `Transfer`."""
        fetched = logits.to("cpu", non_blocking=True)
        has_arrived = torch.cuda.Event()
        has_arrived.record(torch.cuda.current_stream(self._device))

        def read() -> list[float]:
            has_arrived.synchronize()
            values: list[float] = fetched.tolist()
            return values

        return read


class _Slot:
    """A pinned buffer, and the event behind the last copy out of it."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self.array: IntArray = self.tensor.numpy()
        self.has_left = torch.cuda.Event()
