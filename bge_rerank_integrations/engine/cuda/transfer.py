"""Ids to the device and logits back from it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int32]


class Transfer(Protocol):
    """A way to and from a device, used by one thread at a time but for what `download` returns.

    What is uploaded stays until the next upload but one; what `download` returns is called once.

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
    stream that computes it would come after them. They take turns on two slots, each a pinned buffer, in
    which a batch is laid out, and one on the device. A download goes on the stream that computes, so it comes
    after the forward pass and before the next one, which may write into the same memory (a CUDA graph does).
    To wait for it is to wait for an event behind it, not for the stream, where the next batch may be
    computing already.

    All buffers are made here, once. So no request can fail for want of pinned memory, and none depends on
    torch's allocators to tell when a stream is done with what another one wrote: those put that off for
    good after a capture of a CUDA graph that failed.

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
            self._slots = deque(_Slot(3 * max_tokens + 1, device) for _ in range(self.depth))
            # What used the memory of the slots before may still run, and uploads would not wait for it.
            torch.cuda.synchronize()
        self._results = [torch.empty(max_tokens, pin_memory=True) for _ in range(self.depth)]

    def upload(self, parts: Sequence[IntArray]) -> Tensor:
        """See `Transfer`."""
        size = sum(map(len, parts))
        computing = torch.cuda.current_stream(self._device)
        # All that was launched before now, and with it all that reads the last slot, also where a forward
        # pass ended in an error halfway; the slot's turn comes with the upload after this one.
        self._slots[-1].was_read.record(computing)
        if size > len(self._slots[0].array):
            return self._plain.upload(parts)
        slot = self._slots[0]
        self._slots.rotate(-1)
        slot.has_left.synchronize()  # one that was never recorded has
        np.concatenate(parts, out=slot.array[:size])
        uploaded = slot.on_device[:size]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.was_read)
            uploaded.copy_(slot.pinned[:size], non_blocking=True)
            slot.has_left.record()
        computing.wait_event(slot.has_left)
        return uploaded

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        """See `Transfer`."""
        if not self._results or len(logits) > len(self._results[0]):
            return self._plain.download(logits)
        result = self._results.pop()
        fetched = result[: len(logits)]
        fetched.copy_(logits, non_blocking=True)
        has_arrived = torch.cuda.Event()
        has_arrived.record(torch.cuda.current_stream(self._device))

        def read() -> list[float]:
            has_arrived.synchronize()
            values: list[float] = fetched.tolist()
            self._results.append(result)
            return values

        return read


class _Slot:
    """A pinned buffer and one on the device.

    Attributes:
        has_left: Comes after the last copy out of the pinned buffer.
        was_read: Comes after all that reads the one on the device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.pinned = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self.array: IntArray = self.pinned.numpy()
        self.on_device = torch.empty(size, dtype=torch.int32, device=device)
        self.has_left = torch.cuda.Event()
        self.was_read = torch.cuda.Event()
