"""Replays batches as CUDA graphs, which launch all kernels of a forward pass at once."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bge_rerank_integrations.engine.attention import works_in_graphs
from bge_rerank_integrations.engine.current_device import on_device
from bge_rerank_integrations.engine.packing import IntArray, PackedBatch, Seqlens, pack
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

logger = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
"""Captures a function that reads fixed buffers. The result repeats its work on the buffers' current contents.

The result returns the same tensor each time, which must be read before the next call.
"""

# Sizes of buckets: multiples of 128, then four sizes between two powers of two, and eight from 4,096 on.
# Close sizes waste little work on padding.
_NUM_ROWS: Final = (
    *(128, 256, 384),
    *(size * step for size in (128, 256, 512) for step in (4, 5, 6, 7)),
    *(size * step for size in (512, 1024) for step in range(8, 16)),
    16_384,
)
MAX_ROWS: Final = _NUM_ROWS[-1]
# A larger bucket has this many sequences, or one per `_TOKENS_PER_SEQUENCE_OF_LARGE` tokens if that is more.
_MAX_SEQUENCES: Final = 128
_TOKENS_PER_SEQUENCE_OF_LARGE: Final = 64
# Longest sequence of a bucket. Attention launches blocks for the longest sequence once for each sequence of a
# bucket. With the 8,192 tokens that some models accept, nearly all of these blocks would have nothing to do.
_MAX_SEQLEN: Final = 512
# A bucket of up to 2,048 rows has one sequence per this many tokens. Batches of shorter sequences run without
# a graph, but they are rare, since a sequence contains two texts and four special tokens.
_TOKENS_PER_SEQUENCE: Final = 16
# Buckets of up to 4,096 rows always get a graph. For a larger bucket, we measure a pass without a graph. It
# gets a graph if the host needs at least half of the total time to launch the kernels. The limit is half,
# because launching takes twice as long while other threads run.
_ALWAYS_ROWS: Final = 4096
_LAUNCH_SHARE: Final = 0.5
# Two sequences to capture graphs with. Every vocabulary has these ids.
_EXAMPLES: Final = [np.array([0, 2, 2, 0, 2], dtype=np.int32), np.array([2, 0, 2], dtype=np.int32)]
# Largest difference of a logit after a capture, in which a library may choose another algorithm.
_TOLERANCE: Final = 0.05


class Times(NamedTuple):
    """How long an idle device takes for a function.

    Attributes:
        launch_s: Seconds until the host has launched everything.
        total_s: Seconds until the device is done.
    """

    launch_s: float
    total_s: float


class Bucket(NamedTuple):
    """The shape that a batch is padded to.

    Attributes:
        num_rows: Number of tokens. At least one of them is padding.
        num_sequences: Number of sequences, including padding sequences and empty ones.
        max_seqlen: Longest sequence, in tokens.
    """

    num_rows: int
    num_sequences: int
    max_seqlen: int


def can_capture(device: torch.device, attention: Callable[..., object]) -> bool:
    """Return whether a forward pass with an attention implementation can be captured on a device."""
    return device.type == "cuda" and works_in_graphs(attention)


def plan_buckets(max_length: int, max_batch_tokens: int) -> list[Bucket]:
    """Return the buckets for batches of up to `max_batch_tokens` tokens, smallest first.

    Args:
        max_length: Longest sequence of the model, in tokens. A bucket holds sequences of up to 512 tokens.
        max_batch_tokens: Most tokens in one batch.

    Example:
        >>> plan_buckets(max_length=512, max_batch_tokens=100)
        [Bucket(num_rows=128, num_sequences=8, max_seqlen=128)]
    """
    longest = min(max_length, _MAX_SEQLEN)
    buckets = [
        Bucket(
            num_rows,
            min(
                num_rows // _TOKENS_PER_SEQUENCE,
                max(_MAX_SEQUENCES, num_rows // _TOKENS_PER_SEQUENCE_OF_LARGE),
            ),
            min(longest, num_rows),
        )
        for smaller, num_rows in zip((0, *_NUM_ROWS[:-1]), _NUM_ROWS, strict=True)
        if smaller <= max_batch_tokens
    ]
    # Padding is cut into sequences too. Where sequences are short, it would not leave room for any other.
    return [each for each in buckets if -(-each.num_rows // each.max_seqlen) + 1 < each.num_sequences]


class Graphs:
    """A forward pass that replays CUDA graphs for batches of captured shapes and runs others directly.

    The shapes of a graph are fixed. So is the longest sequence, which determines the grid of the attention
    kernel. A batch is therefore padded with sequences whose scores are dropped: first empty sequences, which
    attention skips, then as few sequences as possible for the remaining rows. Every row belongs to a
    sequence, so all rows are computed in the same way. Every sequence starts at an existing row, the empty
    ones too, since at least one row of padding follows them. Sequences do not affect each other.

    Only `capture` captures graphs. It leaves out large buckets for which the device computes much longer than
    the host launches: there a graph would save nothing, and its padding would cost time. It also leaves out
    buckets that do not fit into memory. After any other failure it captures none.

    Args:
        forward: Maps a packed batch to logits [B]. It runs on the device, and depends only on the tensors of
            the batch, their shapes and the longest sequence.
        device: The device to run on.
        padding_idx: Id of the padding token.
        buckets: The shapes to capture, smallest first.
        capture: Captures a function, as `CudaCapture` does.
        measure: Runs a function on the idle device and returns its times, as `measure_launch` does.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        *,
        device: torch.device,
        padding_idx: int,
        buckets: Sequence[Bucket],
        capture: Capture,
        measure: Callable[[Callable[[], object]], Times],
    ) -> None:
        self._forward = forward
        self._device = device
        self._padding_idx = padding_idx
        self._buckets = buckets
        self._capture = capture
        self._measure = measure
        self._captured: dict[tuple[int, int], _Captured] = {}

    @property
    def num_captured(self) -> int:
        """Number of captured graphs."""
        return len(self._captured)

    def capture(self) -> None:
        """Capture graphs, once. If this fails, the reason is logged and there are no graphs."""
        captured: dict[Bucket, _Captured] = {}
        try:
            with on_device(self._device):
                # Capture the largest bucket first, so that the others reuse its memory.
                for bucket in reversed(self._useful_buckets()):
                    with suppress(torch.cuda.OutOfMemoryError):
                        captured[bucket] = self._capture_bucket(bucket)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except Exception as error:  # an operator that cannot be captured, or a wrong result
            raise_if_of_signal_handler(error)
            reason = first_line(error)
            logger.warning(
                "CUDA graphs are disabled because a capture failed: %s: %s", type(error).__name__, reason
            )
            return
        finally:
            # From here on, only the functions that replay graphs hold them. After a failure there are none,
            # so the memory of the graphs is free again.
            del self._capture
        self._buckets = sorted(captured)
        self._captured = {bucket[:2]: graph for bucket, graph in captured.items()}
        most = self._buckets[-1].num_rows - 1 if captured else 0
        logger.info("captured %d CUDA graphs for batches of up to %d tokens", len(captured), most)

    def pad(self, sequences: Sequence[IntArray]) -> Sequence[IntArray]:
        """Return a batch padded to the shape of a bucket, or the batch itself if no bucket fits."""
        if not self._captured:
            return sequences
        num_tokens = sum(map(len, sequences))
        place = bisect_right(self._buckets, num_tokens, key=lambda bucket: bucket.num_rows)
        if place == len(self._buckets):
            return sequences
        return fill_up(sequences, self._buckets[place], self._padding_idx) or sequences

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the logits of a batch. The next call may overwrite the logits of a replayed batch."""
        captured = self._captured.get((len(batch.ids), len(batch.seqlens.lengths)))
        if captured is None or batch.seqlens.max_seqlen > captured.batch.seqlens.max_seqlen:
            return self._forward(batch)
        captured.fill(batch)
        return captured.replay()

    def _useful_buckets(self) -> Sequence[Bucket]:
        """Return the buckets, smallest first, without the large ones for which a graph saves nothing."""
        num_small = bisect_right(self._buckets, _ALWAYS_ROWS, key=lambda bucket: bucket.num_rows)
        # The larger a bucket is, the longer the device computes, while the launch takes the same time.
        return self._buckets[
            : bisect_left(self._buckets, True, num_small, key=lambda bucket: not self._saves_time(bucket))
        ]

    def _saves_time(self, bucket: Bucket) -> bool:
        batch = self._pack(bucket, _EXAMPLES)
        try:
            times = self._measure(lambda: self._forward(batch))
        except torch.cuda.OutOfMemoryError:
            return False
        return times.launch_s >= _LAUNCH_SHARE * times.total_s

    def _capture_bucket(self, bucket: Bucket) -> _Captured:
        batch = self._pack(bucket, _EXAMPLES)
        seqlens = Seqlens(batch.seqlens.lengths, batch.seqlens.cu_seqlens.clone(), bucket.max_seqlen)
        static = PackedBatch(batch.ids.clone(), batch.positions.clone(), seqlens)
        captured = _Captured(static, self._capture(lambda: self._forward(static)))
        # Compare on other contents than at the capture, to detect a graph that does not read its buffers.
        others = [*_EXAMPLES[::-1], _EXAMPLES[-1]]
        captured.fill(self._pack(bucket, others))
        expected = self._forward(static)[: len(others)].clone()
        # Leave out the padding: attention may compute anything for an empty sequence.
        torch.testing.assert_close(captured.replay()[: len(others)], expected, rtol=0, atol=_TOLERANCE)
        return captured

    def _pack(self, bucket: Bucket, sequences: list[IntArray]) -> PackedBatch:
        padded = fill_up(sequences, bucket, self._padding_idx)
        assert padded is not None, f"{bucket} cannot hold two short sequences"
        return pack(padded, padding_idx=self._padding_idx, device=self._device)


def fill_up(sequences: Sequence[IntArray], bucket: Bucket, padding_idx: int) -> list[IntArray] | None:
    """Pad a batch with sequences to the shape of a bucket; return None if the batch does not fit."""
    lengths = [len(sequence) for sequence in sequences]
    filling = np.full(max(bucket.num_rows - sum(lengths), 0), padding_idx, dtype=np.int32)
    longest = bucket.max_seqlen
    fillers = [filling[start : start + longest] for start in range(0, len(filling), longest)]
    num_empty = bucket.num_sequences - len(sequences) - len(fillers)
    if not fillers or num_empty < 0 or max(lengths) > longest:
        return None
    return [*sequences, *[filling[:0]] * num_empty, *fillers]


def measure_launch(function: Callable[[], object]) -> Times:
    """Return the times of a function on the current CUDA device.

    If the device has other work, it seems to take longer for the function than it does.
    """
    launches, totals = [], []
    for _ in range(3):  # the first pass loads kernels
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        launches.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        totals.append(time.perf_counter() - began)
    return Times(min(launches[1:]), min(totals[1:]))


class CudaCapture:
    """Captures CUDA graphs that share memory, since only one of them is replayed at a time.

    No graph is destroyed while another one may still be replayed, not even a graph whose capture failed. When
    torch destroys a graph, releases since February 2026 (pytorch/pytorch#175276) free the workspace that
    cuBLAS has for the stream of the capture. All graphs here are captured on one stream, and the others would
    still write to that workspace (https://github.com/pytorch/pytorch/issues/193402). Therefore this object
    holds all graphs, and each function that replays one of them holds this object.

    Args:
        device: The device to capture on.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._index = torch.cuda.current_device()
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        self._scratch = torch.zeros(1, dtype=torch.float32, device=device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._has_captured = False

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """See `Capture`."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        place = len(self._graphs)
        graph = self._new_graph()
        # This block also restores the thread's stream after a failed capture: `torch.cuda.graph` of older
        # releases leaves its own stream in place if the end of the capture raises.
        with torch.cuda.stream(stream), self._cleaning_up():
            function()  # libraries create handles and workspaces in their first call, outside a graph
            # Check only this thread: other threads of the process may use the device during the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                # `replay` keeps a reference, so that no later capture from the pool reuses this memory.
                output = function()
        self._has_captured = True

        def replay() -> Tensor:
            self._graphs[place].replay()
            return output

        return replay

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        self._graphs.append(torch.cuda.CUDAGraph())
        return self._graphs[-1]

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Tell torch's allocator and its random generator that a failed capture has ended.

        If the end of a capture raises, `CUDAGraph.capture_end` of many releases returns before it does this.
        torch delays the release of memory that several streams used until no capture runs. Without this call,
        torch would assume that a capture is still running.
        """
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the allocator already knows
                torch._C._cuda_endAllocateToPool(self._index, self._pool)
                torch._C._cuda_releasePool(self._index, self._pool)
            with suppress(Exception):  # the device has failed
                self._free_generator()
            if not self._has_captured:
                self._graphs.clear()  # nothing is replayed yet, and the next capture may need the memory
            raise

    def _free_generator(self) -> None:
        """Capture a graph of one kernel, which makes the device's default generator usable again.

        Every capture marks the default generator when it begins, and removes the mark when it ends without an
        error. In torch 2.10, a capture that ends with an error leaves the mark. Random numbers on the device
        and replays of other graphs then raise an error, until a later capture ends without an error.
        """
        graph = self._new_graph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._scratch.zero_()


class _Captured(NamedTuple):
    """A captured graph and the buffers that it reads."""

    batch: PackedBatch
    replay: Replay

    def fill(self, batch: PackedBatch) -> None:
        ours, theirs = self.batch, batch
        ours.ids.copy_(theirs.ids)
        ours.positions.copy_(theirs.positions)
        ours.seqlens.cu_seqlens.copy_(theirs.seqlens.cu_seqlens)
