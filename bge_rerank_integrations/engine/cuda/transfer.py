"""Copies token ids to a device and logits back to the host."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bge_rerank_integrations.engine.packing import IntArray
from bge_rerank_integrations.runtime.tracebacks import raise_if_of_signal_handler

logger = logging.getLogger(__name__)


class Transfer(Protocol):
    """Copies to and from a device.

    Only one thread at a time calls the methods. Any thread may call the function that `download` returns,
    once. An uploaded tensor is valid until the second upload after it.

    Attributes:
        depth: Number of batches that may run at once.
    """

    depth: int

    def upload(self, parts: Sequence[IntArray]) -> Tensor:
        """Concatenate int32 arrays into one tensor on the device."""

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        """Start to copy logits [B] to the host. Return a function that waits for them and returns them."""


def resolve_transfer(device: torch.device, max_tokens: int) -> Transfer:
    """Choose how to copy to and from a device.

    Args:
        device: The device.
        max_tokens: Most tokens of a batch for which pinned buffers are used.
    """
    if device.type == "cuda":
        try:
            return PinnedTransfer(device, max_tokens)
        except RuntimeError as error:  # some systems limit pinned memory
            raise_if_of_signal_handler(error)
            logger.info("no pinned memory for copies to %s: %s", device, type(error).__name__)
    return PlainTransfer(device)


class PlainTransfer:
    """Copies that are complete when the call returns. One batch runs at a time.

    Args:
        device: The device.
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
    """Asynchronous copies to and from a CUDA device.

    All copies run on the stream that computes, in the order of the calls. An upload comes after the forward
    passes that were launched before it, so that it cannot overwrite what they read. A download comes after
    its forward pass and before the next one, which may overwrite the logits, as a CUDA graph does. A caller
    waits for an event after its download, not for the stream, since the next batch may already be computing
    on it. Uploads alternate between two slots. The host can therefore lay out the next batch before the
    previous one has been copied.

    All buffers are allocated once, in the constructor. So no request can fail because memory cannot be
    pinned.

    Args:
        device: The device.
        max_tokens: Most tokens of a batch for which the buffers are used. Larger batches use a
            `PlainTransfer`.

    Raises:
        RuntimeError: Memory cannot be pinned.
    """

    depth = 2

    def __init__(self, device: torch.device, max_tokens: int) -> None:
        self._device = device
        self._plain = PlainTransfer(device)
        with torch.cuda.device(device):
            # A batch has ids, position ids and bounds of sequences. It has no more sequences than tokens.
            self._slots = deque(_Slot(3 * max_tokens + 1, device) for _ in range(self.depth))
        self._results = [
            torch.empty(max_tokens, dtype=torch.float32, pin_memory=True) for _ in range(self.depth)
        ]

    def upload(self, parts: Sequence[IntArray]) -> Tensor:
        """See `Transfer`."""
        size = sum(map(len, parts))
        if size > len(self._slots[0].array):
            return self._plain.upload(parts)
        slot = self._slots[0]
        self._slots.rotate(-1)
        slot.has_left.synchronize()  # returns at once if the event was never recorded
        np.concatenate(parts, out=slot.array[:size])
        uploaded = slot.on_device[:size]
        uploaded.copy_(slot.pinned[:size], non_blocking=True)
        slot.has_left.record(torch.cuda.current_stream(self._device))
        return uploaded

    def download(self, logits: Tensor) -> Callable[[], list[float]]:
        """See `Transfer`."""
        if not self._results or len(logits) > len(self._results[0]):
            return self._plain.download(logits)
        result = self._results.pop()
        fetched = result[: len(logits)]
        fetched.copy_(logits, non_blocking=True)
        has_arrived = _event()
        has_arrived.record(torch.cuda.current_stream(self._device))

        def read() -> list[float]:
            # The thread that reads has selected no device. Without this, CUDA would create a context on the
            # first GPU, whichever GPU computes.
            with torch.cuda.device(self._device):
                has_arrived.synchronize()
            values: list[float] = fetched.tolist()
            self._results.append(result)
            return values

        return read


class _Slot:
    """A pinned buffer and a buffer on the device.

    Attributes:
        has_left: Event after the last copy from the pinned buffer.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.pinned = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self.array: IntArray = self.pinned.numpy()
        self.on_device = torch.empty(size, dtype=torch.int32, device=device)
        self.has_left = _event()


def _event() -> torch.cuda.Event:
    """Return an event that a thread waits for without using a core. By default, CUDA would poll it."""
    return torch.cuda.Event(blocking=True)
