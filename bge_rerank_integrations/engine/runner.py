"""Runs batches through one model on one device: token ids in, logits out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.build import ModelSpec, build_model
from bge_rerank_integrations.engine.checkpoint.files import identity, verify_sha256
from bge_rerank_integrations.engine.cpu.thread_count import call_with_threads, set_thread_count
from bge_rerank_integrations.engine.cuda.graphs import MAX_ROWS, Graphs
from bge_rerank_integrations.engine.cuda.transfer import PlainTransfer, Transfer, resolve_transfer
from bge_rerank_integrations.engine.current_device import not_compiled, on_device, without_thread_settings
from bge_rerank_integrations.engine.device import (
    resolve_device,
    resolve_dtype,
    resolve_max_batch_tokens,
    resolve_num_threads,
)
from bge_rerank_integrations.engine.packing import IntArray, PackedBatch, pack
from bge_rerank_integrations.engine.shape import EncoderShape
from bge_rerank_integrations.runtime.fork_guard import is_child
from bge_rerank_integrations.runtime.locks import SafeLock

logger = logging.getLogger(__name__)

# Most time in seconds that a batch should take on a GPU. A short request may wait for the batches that were
# launched before it. A longer time would not use the GPU better.
_BATCH_S: Final = 0.05
# The speed of a GPU is measured with a batch of about this many tokens, in sequences of at most this length.
# It fills every GPU. With fewer tokens, launching the kernels would take most of the time.
_MEASURED_TOKENS: Final = 4096
_MEASURED_LENGTH: Final = 512
# A smaller budget would leave parts of a GPU idle.
_MIN_BUDGET_TOKENS: Final = 1024
# Batches without an out-of-memory error after which the token budget doubles. A budget that turns out to be
# too large costs one failed batch, so it must not be tried often.
_BATCHES_TO_GROW = 100


@dataclasses.dataclass(frozen=True)
class Pending:
    """A batch that was launched.

    Attributes:
        read: Waits for the logits of the sequences, in the order of `positions`.
        positions: For each logit, the position of its sequence in the call of `Runner.launch`.
    """

    read: Callable[[], list[float]]
    positions: list[int]

    def wait(self) -> list[float]:
        """Wait for the batch and return the raw logit of each sequence, in the order of the call."""
        logits = dict(zip(self.positions, self.read(), strict=True))
        return [logits[position] for position in range(len(logits))]


class Runner:
    """Runs batches of sequences through a model. It may be called from any number of threads.

    Args:
        forward: Maps a packed batch of B sequences to float32 logits [B] on the device.
        device: The device that the batches run on.
        padding_idx: Id of the padding token. Position ids start at `padding_idx + 1`.
        max_batch_tokens: Most tokens in one forward pass at the start.
        row_multiple: Batches are padded to a multiple of this number of rows.
        num_threads: Number of CPU threads that compute; None for torch's current setting. A thread that
            launches a batch keeps this number.
        transfer: Copies to and from the device, and limits how many batches run at once; None for a
            `PlainTransfer`.
        graphs: Replays batches as CUDA graphs instead of calling `forward`, if they are captured.

    Attributes:
        device: The device that the batches run on.
        depth: Number of batches that may be launched before the first of them is waited for.
        max_batch_tokens: Most tokens in one forward pass now. An out-of-memory error lowers it. It grows back
            while batches succeed, since another program may have used the memory only for a while.
        num_splits: Number of batches that ran out of memory and lowered `max_batch_tokens`.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        *,
        device: torch.device,
        padding_idx: int,
        max_batch_tokens: int,
        row_multiple: int = 1,
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
        self._row_multiple = row_multiple
        self._num_threads = num_threads
        self._transfer = transfer or PlainTransfer(device)
        self._graphs = graphs
        self._lock = SafeLock()
        self.depth = self._transfer.depth

    def limit_batch_time(self, max_length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Lower the token budget so that a batch takes at most about 50 ms, as far as the device needs that.

        Args:
            max_length: Longest sequence in tokens that requests can have.
            clock: Returns the time in seconds.
        """
        length = min(max_length, _MEASURED_LENGTH)
        sequences = [np.zeros(length, np.int32)] * (_MEASURED_TOKENS // length)
        times: list[float] = []
        for _ in range(3):  # the first pass loads kernels
            began = clock()
            pending = self.launch(sequences)
            if pending is None:
                return  # out of memory, which has lowered the budget already
            pending.wait()
            times.append(clock() - began)
        num_tokens = int(_BATCH_S * len(sequences) * length / max(min(times[1:]), 1e-9))
        self._full_budget = min(self._full_budget, max(num_tokens, _MIN_BUDGET_TOKENS))
        self.max_batch_tokens = min(self.max_batch_tokens, self._full_budget)
        logger.info("batches on %s have at most %d tokens", self.device, self.max_batch_tokens)

    def launch(self, sequences: Sequence[IntArray], *, is_alone: bool = True) -> Pending | None:
        """Start a batch. Where copies to the host do not block, this returns before the batch is done.

        An out-of-memory error lowers the token budget only if no other batch of the caller was running.
        Otherwise the caller tries the sequences again later: they may fit into memory by themselves.

        Args:
            sequences: int32 token ids of each sequence. No sequence is empty or longer than the model's
                limit.
            is_alone: Whether the caller has waited for all batches that it launched before.

        Returns:
            The launched batch; None if it ran out of memory.

        Raises:
            torch.cuda.OutOfMemoryError: A single sequence does not fit into memory. Any other error of the
                forward pass is raised unchanged.
        """
        num_tokens = sum(map(len, sequences))
        # Sequences of similar length come together. Attention without a kernel for varied lengths calls one
        # for each run of equal lengths.
        positions = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        try:
            with self._lock, on_device(self.device):
                if self._num_threads is not None:
                    set_thread_count(self._num_threads)
                read = self._launch([sequences[index] for index in positions])
                self._grow()
            return Pending(read, positions)
        except torch.cuda.OutOfMemoryError:
            if len(sequences) == 1 and is_alone:
                raise
        # This code is outside the handler, because the traceback keeps the tensors of the failed pass alive.
        if is_alone:
            self._shrink(num_tokens, len(sequences))
        return None

    def _shrink(self, num_tokens: int, num_sequences: int) -> None:
        """Lower the token budget after a batch that ran out of memory."""
        with self._lock:
            self.num_splits += 1
            self._num_batches_since_split = 0
            self.max_batch_tokens = min(self.max_batch_tokens, max(num_tokens // 2, 1))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        with suppress(Exception):  # a logging filter of the application may raise
            logger.warning(
                "out of memory with %d tokens in %d sequences; batches now hold at most %d tokens",
                num_tokens,
                num_sequences,
                self.max_batch_tokens,
            )

    def _launch(self, sequences: list[IntArray]) -> Callable[[], list[float]]:
        graphs = self._graphs
        batch = pack(
            sequences if graphs is None else graphs.pad(sequences),
            padding_idx=self._padding_idx,
            device=self.device,
            row_multiple=self._row_multiple,
            upload=self._transfer.upload,
        )
        logits = self._forward(batch) if graphs is None else graphs(batch)
        # Drop the logits of the sequences that only padded the batch.
        return self._transfer.download(logits[: len(sequences)])

    def _grow(self) -> None:
        if self.max_batch_tokens < self._full_budget:
            self._num_batches_since_split += 1
            if self._num_batches_since_split % _BATCHES_TO_GROW == 0:
                self.max_batch_tokens = min(2 * self.max_batch_tokens, self._full_budget)


def is_device_lost(error: BaseException) -> bool:
    """Return whether every later forward pass in this process would fail too, given the error of one pass."""
    message = str(error)
    if not isinstance(error, RuntimeError) or "out of memory" in message or "CUBLAS" in message:
        return False
    # Triton reports an error of the device as a RuntimeError of its own.
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or any(
        name in message for name in ("CUDA error", "Triton Error [CUDA]")
    )


def load_runners(config: ScorerConfig, folder: Path, shape: EncoderShape) -> list[Runner]:
    """Load a verified checkpoint onto each device that the config selects.

    Raises:
        RerankError: See `load_runner`.
    """
    load = not_compiled(_load_runners)
    if not is_child():
        return load(config, folder, shape)
    # If the thread that forked had computed with several threads in torch, it would wait for them for ever.
    # They exist only in the parent. A new thread starts threads of its own.
    with ThreadPoolExecutor(1, "bge-rerank-load") as executor:
        return executor.submit(load, config, folder, shape).result()


@without_thread_settings()
def _load_runners(config: ScorerConfig, folder: Path, shape: EncoderShape) -> list[Runner]:
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
            config.max_batch_tokens is None and device.type != "cpu",
            resolve_num_threads(config),
            # CUDA graphs depend on it.
            config.max_length if device.type == "cuda" and config.capture_graphs else None,
        )
        runner = _loaded.get(key)
        if runner is None:
            runner = _loaded[key] = _load(config, folder, shape, key)
        return runner


def _load(config: ScorerConfig, folder: Path, shape: EncoderShape, key: _Key) -> Runner:
    # Loading computes too.
    runner = call_with_threads(key.num_threads, lambda: _make_runner(config, folder, shape, key))
    if key.device.type == "cuda":
        # The application may load in a block of `torch.cuda.stream`. Batches run on another stream, which
        # does not wait for what loading has launched.
        torch.cuda.synchronize(key.device)
    return runner


def _make_runner(config: ScorerConfig, folder: Path, shape: EncoderShape, key: _Key) -> Runner:
    device, max_batch_tokens = key.device, key.max_batch_tokens
    model = build_model(ModelSpec(folder, shape, config, device, key.dtype, max_batch_tokens))
    runner = Runner(
        model.forward,
        device=device,
        padding_idx=shape.padding_idx,
        max_batch_tokens=max_batch_tokens,
        row_multiple=model.row_multiple,
        num_threads=key.num_threads,
        transfer=resolve_transfer(device, max(max_batch_tokens, MAX_ROWS)),
        graphs=model.graphs,
    )
    if key.limits_batch_time:
        runner.limit_batch_time(config.max_length)
    return runner


class _Key(NamedTuple):
    """The settings that two scorers must have in common to share a runner."""

    identity: tuple[tuple[str, int, int], ...]
    device: torch.device
    dtype: torch.dtype
    max_batch_tokens: int
    limits_batch_time: bool
    num_threads: int
    max_length: int | None


# Only scorers hold strong references, so a runner is freed with its last scorer.
_loaded: WeakValueDictionary[_Key, Runner] = WeakValueDictionary()
_loading = SafeLock()
