"""Runs batches through one model on one device: token ids in, logits out."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.batch_planning import plan_batches
from bge_rerank_integrations.engine.build import ModelSpec, build_model
from bge_rerank_integrations.engine.checkpoint.files import identity, verify_sha256
from bge_rerank_integrations.engine.cuda.graphs import MAX_ROWS, Graphs
from bge_rerank_integrations.engine.cuda.transfer import PlainTransfer, Transfer, resolve_transfer
from bge_rerank_integrations.engine.device import (
    resolve_device,
    resolve_dtype,
    resolve_max_batch_tokens,
)
from bge_rerank_integrations.engine.model import EncoderShape
from bge_rerank_integrations.engine.packing import PackedBatch, pack

logger = logging.getLogger(__name__)

# Batches without an out-of-memory error after which the token budget doubles. A budget that turns out to be
# too large costs one failed batch, so it must not be tried often.
_BATCHES_TO_GROW = 100


class Runner:
    """Runs batches of sequences through a model. It may be called from any number of threads.

    Args:
        forward: Maps a packed batch of B sequences to float32 logits [B] on the device.
        device: The device that the batches run on.
        padding_idx: Id of the padding token. Position ids start at `padding_idx + 1`.
        max_batch_tokens: Most tokens in one forward pass at the start.
        num_rows: Returns the number of rows to pad a batch to, given its number of tokens.
        num_threads: Number of CPU threads that compute; None for torch's current setting.
        transfer: Copies to and from the device, and limits how many batches run at once; None for a
            `PlainTransfer`.
        graphs: Replays small batches as CUDA graphs instead of calling `forward`, once they are captured.

    Attributes:
        device: The device that the batches run on.
        max_batch_tokens: Most tokens in one forward pass now. An out-of-memory error lowers it. It grows back
            while batches succeed, since another program may have used the memory only for a while.
        num_splits: Number of batches that ran out of memory.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        *,
        device: torch.device,
        padding_idx: int,
        max_batch_tokens: int,
        num_rows: Callable[[int], int] = int,
        num_threads: int | None = None,
        transfer: Transfer | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.device = device
        self.max_batch_tokens = max_batch_tokens
        self.num_splits = 0
        self._full_budget = max_batch_tokens
        self._num_batches_since_split = 0
        self._forward = forward
        self._padding_idx = padding_idx
        self._num_rows = num_rows
        self._num_threads = num_threads
        self._transfer = transfer or PlainTransfer(device)
        self._graphs = graphs
        self._lock = threading.Lock()

    @property
    def max_call_tokens(self) -> int:
        """Most tokens that one call can keep running at once: the token budget of each concurrent batch."""
        return self.max_batch_tokens * self._transfer.depth

    def warmup(self) -> None:
        """Capture CUDA graphs where they are supported. Without this call, batches run without graphs."""
        if self._graphs is not None:
            with self._lock, self._on_device():
                self._graphs.capture()

    def run(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        on_progress: Callable[[int], object] | None = None,
    ) -> list[float]:
        """Score sequences. Batches of other threads may run between the batches of this call.

        Args:
            sequences: int32 token ids of each sequence. No sequence is empty or longer than the model's
                limit.
            on_progress: Called after each batch with the number of sequences in it.

        Returns:
            The raw logit of each sequence, in input order.

        Raises:
            torch.cuda.OutOfMemoryError: A single sequence does not fit into memory. Any other error of the
                forward pass is raised unchanged.
        """
        lengths = [len(sequence) for sequence in sequences]
        logits = [0.0] * len(sequences)
        pending = deque(plan_batches(lengths, self.max_batch_tokens))
        running: deque[tuple[list[int], Callable[[], list[float]]]] = deque()
        try:
            while pending or running:
                # If copies do not block, the next batch is packed and launched while this one computes.
                if pending and len(running) < self._transfer.depth:
                    batch = pending.popleft()
                    read = self._try([sequences[index] for index in batch], is_alone=not running)
                    if read is not None:
                        running.append((batch, read))
                        continue
                    if not running:
                        rest = [index for later in (batch, *pending) for index in later]
                        plan = plan_batches([lengths[index] for index in rest], self.max_batch_tokens)
                        pending = deque([[rest[position] for position in part] for part in plan])
                        continue
                    pending.appendleft(batch)
                batch, read = running.popleft()
                for index, value in zip(batch, read(), strict=True):
                    logits[index] = value
                if on_progress is not None:
                    on_progress(len(batch))
        finally:
            for _, read in running:  # after an error, wait for the batches that are still running
                with suppress(Exception):
                    read()
        return logits

    def _try(
        self, sequences: list[npt.NDArray[np.int32]], *, is_alone: bool
    ) -> Callable[[], list[float]] | None:
        """Launch one batch.

        An out-of-memory error lowers the token budget only if no other batch of this call was running.
        Otherwise the caller tries the batch again later, without others: it may fit into memory by itself.

        Args:
            sequences: int32 token ids of each sequence.
            is_alone: Whether no other batch of this call is running.

        Returns:
            A function that waits for the logits and returns them; None if the batch ran out of memory.
        """
        num_tokens = sum(map(len, sequences))
        try:
            with self._lock, _cpu_threads(self._num_threads), self._on_device():
                read = self._launch(sequences)
                self._grow()
            return read
        except torch.cuda.OutOfMemoryError:
            if len(sequences) == 1 and is_alone:
                raise
        # This code is outside the handler, because the traceback keeps the tensors of the failed pass alive.
        if not is_alone:
            return None
        with self._lock:
            self.num_splits += 1
            self._num_batches_since_split = 0
            self.max_batch_tokens = min(self.max_batch_tokens, max(num_tokens // 2, 1))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        logger.warning(
            "out of memory with %d tokens in %d sequences; batches now hold at most %d tokens",
            num_tokens,
            len(sequences),
            self.max_batch_tokens,
        )
        return None

    def _launch(self, sequences: list[npt.NDArray[np.int32]]) -> Callable[[], list[float]]:
        graphs = self._graphs
        batch = pack(
            sequences if graphs is None else graphs.pad(sequences),
            padding_idx=self._padding_idx,
            device=self.device,
            num_rows=self._num_rows,
            upload=self._transfer.upload,
        )
        logits = self._forward(batch) if graphs is None else graphs(batch)
        # Drop the logits of the sequences that only padded the batch.
        return self._transfer.download(logits[: len(sequences)])

    def _on_device(self) -> AbstractContextManager[object]:
        """Make the device current for this thread: Triton kernels and new streams use the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _grow(self) -> None:
        if self.max_batch_tokens < self._full_budget:
            self._num_batches_since_split += 1
            if self._num_batches_since_split % _BATCHES_TO_GROW == 0:
                self.max_batch_tokens = min(2 * self.max_batch_tokens, self._full_budget)


@contextmanager
def _cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Compute with `num_threads` threads in this block. In torch this is a setting of the calling thread."""
    before = torch.get_num_threads()
    if num_threads is None or num_threads == before:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_device_lost(error: BaseException) -> bool:
    """Return whether every later forward pass in this process would fail too, given the error of one pass."""
    message = str(error)
    if not isinstance(error, RuntimeError) or "out of memory" in message or "CUBLAS" in message:
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in message


def load_runners(config: ScorerConfig, folder: Path, shape: EncoderShape) -> list[Runner]:
    """Load a verified checkpoint onto each device that the config selects.

    Raises:
        RerankError: See `load_runner`.
    """
    first, *others = config.per_device()
    for other in others:
        resolve_device(other)  # raise for a missing device before loading the first model
    # All devices load the same files, so one comparison of the digest is enough.
    others = [dataclasses.replace(other, sha256=None) for other in others]
    return [load_runner(each, folder, shape) for each in (first, *others)]


def load_runner(config: ScorerConfig, folder: Path, shape: EncoderShape) -> Runner:
    """Return a runner for a verified checkpoint. Scorers with equal settings share one runner.

    Raises:
        CheckpointError: The weights cannot be used.
        ConfigError: The device does not support the precision.
        DeviceError: The device is not available.
    """
    device = resolve_device(config)
    if config.sha256 is not None:
        verify_sha256(folder, config.sha256)
    with _loading:
        key = _Key(
            identity(folder),
            device,
            resolve_dtype(config, device),
            resolve_max_batch_tokens(config, device),
            config.num_threads,
            # CUDA graphs depend on it.
            config.max_length if device.type == "cuda" and config.capture_graphs else None,
        )
        runner = _loaded.get(key)
        if runner is None:
            runner = _loaded[key] = _load(config, folder, shape, key)
        return runner


def _load(config: ScorerConfig, folder: Path, shape: EncoderShape, key: _Key) -> Runner:
    device, max_batch_tokens = key.device, key.max_batch_tokens
    model = build_model(ModelSpec(folder, shape, config, device, key.dtype, max_batch_tokens))
    return Runner(
        model.forward,
        device=device,
        padding_idx=shape.padding_idx,
        max_batch_tokens=max_batch_tokens,
        num_rows=model.num_rows,
        num_threads=config.num_threads,
        transfer=resolve_transfer(device, max(max_batch_tokens, MAX_ROWS)),
        graphs=model.graphs,
    )


class _Key(NamedTuple):
    """The settings that two scorers must have in common to share a runner."""

    identity: tuple[tuple[str, int, int], ...]
    device: torch.device
    dtype: torch.dtype
    max_batch_tokens: int
    num_threads: int | None
    max_length: int | None


# Only scorers hold strong references, so a runner is freed with its last scorer.
_loaded: WeakValueDictionary[_Key, Runner] = WeakValueDictionary()
_loading = threading.Lock()
