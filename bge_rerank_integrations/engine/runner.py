"""One model on one device: ids in, logits out, one forward pass at a time."""

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
from bge_rerank_integrations.engine.build import build_model
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

# A try at more memory costs one failed batch, so it has to be rare.
_BATCHES_TO_GROW = 100


class Runner:
    """Runs batches of sequences through a model, from any number of threads.

    Args:
        forward: A packed batch to float32 logits [B] on the device.
        device: Where the batches go.
        padding_idx: The padding token's id, after which positions begin.
        max_batch_tokens: Most tokens in one forward pass, to begin with.
        num_rows: How many rows the forward pass wants for a number of tokens.
        num_threads: CPU threads to compute with; None is as many as torch is set to.
        transfer: How to copy, and with it how many batches may be under way at once; None is plainly.
        graphs: What to run small batches with instead of `forward`, once they are captured.

    Attributes:
        device: Where the batches go.
        max_batch_tokens: The working budget: out of memory lowers it, and it grows back while all goes
            well, since the memory may have been another program's for a while.
        num_splits: How many batches were out of memory.
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
        """Most tokens that are worth one call: with fewer, nothing is under way beside a batch."""
        return self.max_batch_tokens * self._transfer.depth

    def warmup(self) -> None:
        """Do what is done once and takes longer than a request should; without it, no request does it."""
        if self._graphs is not None:
            with self._lock, self._on_device():
                self._graphs.capture()

    def run(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        on_progress: Callable[[int], object] | None = None,
    ) -> list[float]:
        """Score sequences; other threads' batches may run between this call's.

        Args:
            sequences: int32 ids of each sequence, none empty, none longer than the model takes.
            on_progress: Called with the number of sequences done after each batch.

        Returns:
            The raw logit of each sequence, in order.

        Raises:
            torch.cuda.OutOfMemoryError: A single sequence does not fit. Any other error of the forward
                pass comes through as it is.
        """
        lengths = [len(sequence) for sequence in sequences]
        logits = [0.0] * len(sequences)
        pending = deque(plan_batches(lengths, self.max_batch_tokens))
        running: deque[tuple[list[int], Callable[[], list[float]]]] = deque()
        try:
            while pending or running:
                # Where copies do not wait, the next batch is packed and launched while this one computes.
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
            for _, read in running:  # after an error: nothing of a call is under way when it ends
                with suppress(Exception):
                    read()
        return logits

    def _try(
        self, sequences: list[npt.NDArray[np.int32]], *, is_alone: bool
    ) -> Callable[[], list[float]] | None:
        """Launch one batch and return what waits for its logits; None where it was out of memory.

        The budget is then lowered, but only if no other batch was under way: else the batch is to be tried
        again alone, so that what fails is what would fail without company.
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
        # Outside the handler, whose traceback keeps the failed pass's tensors alive.
        if not is_alone:
            return None
        with self._lock:
            self.num_splits += 1
            self._num_batches_since_split = 0
            self.max_batch_tokens = min(self.max_batch_tokens, max(num_tokens // 2, 1))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        logger.warning(
            "out of memory with %d tokens in %d sequences; now at most %d tokens a batch",
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
        # Without those of sequences that filled the batch up.
        return self._transfer.download(logits[: len(sequences)])

    def _on_device(self) -> AbstractContextManager[object]:
        """Make the device the thread's current one: Triton's kernels and new streams go by that."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _grow(self) -> None:
        if self.max_batch_tokens < self._full_budget:
            self._num_batches_since_split += 1
            if self._num_batches_since_split % _BATCHES_TO_GROW == 0:
                self.max_batch_tokens = min(2 * self.max_batch_tokens, self._full_budget)


@contextmanager
def _cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Compute with a number of threads inside the block; torch counts them for each calling thread apart."""
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
    """Whether an error of a forward pass means that every later one fails too, until a new process."""
    message = str(error)
    if not isinstance(error, RuntimeError) or "out of memory" in message or "CUBLAS" in message:
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in message


def load_runners(config: ScorerConfig, folder: Path, shape: EncoderShape) -> list[Runner]:
    """Load a verified checkpoint onto each device the config means.

    Raises:
        RerankError: As `load_runner` says.
    """
    first, *others = config.per_device()
    for other in others:
        resolve_device(other)  # before the first is loaded for nothing
    # The digest of the same files need be compared but once.
    others = [dataclasses.replace(other, sha256=None) for other in others]
    return [load_runner(each, folder, shape) for each in (first, *others)]


def load_runner(config: ScorerConfig, folder: Path, shape: EncoderShape) -> Runner:
    """Return a verified checkpoint on the device the config means, loaded unless somebody has it already.

    Raises:
        CheckpointError: The weights cannot be used.
        ConfigError: The precision does not go with the device.
        DeviceError: The device is not there.
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
            config.max_length if device.type == "cuda" else None,  # which CUDA graphs are captured for
        )
        runner = _loaded.get(key)
        if runner is None:
            runner = _loaded[key] = _load(config, folder, shape, key)
        return runner


def _load(config: ScorerConfig, folder: Path, shape: EncoderShape, key: _Key) -> Runner:
    device, max_batch_tokens = key.device, key.max_batch_tokens
    model = build_model(
        folder, shape, config, device=device, dtype=key.dtype, max_batch_tokens=max_batch_tokens
    )
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
    """What two scorers must have in common to share a runner."""

    identity: tuple[tuple[str, int, int], ...]
    device: torch.device
    dtype: torch.dtype
    max_batch_tokens: int
    num_threads: int | None
    max_length: int | None


# Held by those who use them alone.
_loaded: WeakValueDictionary[_Key, Runner] = WeakValueDictionary()
_loading = threading.Lock()
