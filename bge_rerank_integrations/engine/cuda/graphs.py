"""Small batches replayed as CUDA graphs, whose kernels cost one launch instead of hundreds."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_integrations.engine.attention import flash_attention
from bge_rerank_integrations.engine.packing import PackedBatch, Seqlens, pack

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int32]

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
"""Makes of a function over buffers that stay one that does the same again, on what is in them by then.

Both give the same tensor each time, to be read before the next call.
"""

# Steps of 128, then of a quarter of an octave: what is filled up is computed.
_NUM_ROWS: Final = (128, 256, 384, *(size * step for size in (128, 256, 512) for step in (4, 5, 6, 7)), 4096)
MAX_ROWS: Final = _NUM_ROWS[-1]
_MAX_SEQUENCES: Final = 128
# A sequence holds two texts and four control tokens; batches of shorter ones run without a graph.
_TOKENS_PER_SEQUENCE: Final = 16
# Of logits: a library may choose another algorithm inside a capture.
_TOLERANCE: Final = 0.05


class Bucket(NamedTuple):
    """The shape that batches are filled up to.

    Attributes:
        num_rows: Tokens, at least one of which is a filler.
        num_sequences: Sequences, fillers and empty ones counted.
        max_seqlen: The longest sequence.
    """

    num_rows: int
    num_sequences: int
    max_seqlen: int


def can_capture(device: torch.device, attention: Callable[..., object]) -> bool:
    """Whether a forward pass depends on nothing but tensors: other attentions read lengths on the host."""
    return device.type == "cuda" and attention is flash_attention


def plan_buckets(max_length: int, max_batch_tokens: int) -> list[Bucket]:
    """Return the buckets, smallest first, for sequences and batches of at most so many tokens.

    Example:
        >>> plan_buckets(max_length=512, max_batch_tokens=100)
        [Bucket(num_rows=128, num_sequences=8, max_seqlen=128)]
    """
    return [
        Bucket(num_rows, min(num_rows // _TOKENS_PER_SEQUENCE, _MAX_SEQUENCES), min(max_length, num_rows))
        for smaller, num_rows in zip((0, *_NUM_ROWS[:-1]), _NUM_ROWS, strict=True)
        if smaller <= max_batch_tokens
    ]


class Graphs:
    """A forward pass that replays graphs where a batch has the shape of one, and else runs as it is.

    A graph's shapes are fixed, the longest sequence included, which sizes the attention kernel's grid. So a
    batch is filled up, by sequences of padding that nobody asked the score of: empty ones first, which
    attention skips, then as few as take the rows that are left. Thus every row belongs to a sequence and
    is computed like any other, and every sequence begins at a row: also the empty ones, since at least one
    filler row comes after them. What is in a row or a sequence reaches no other.

    Nothing is captured but by `capture`, and either all of it or nothing.

    Args:
        forward: A packed batch to logits [B]; on the device, dependent on nothing but the tensors of the
            batch, their shapes and the longest sequence.
        device: Where it runs.
        padding_idx: The padding token's id.
        buckets: Smallest first.
        capture: How to capture; a `CudaCapture`.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        *,
        device: torch.device,
        padding_idx: int,
        buckets: Sequence[Bucket],
        capture: Capture,
    ) -> None:
        self._forward = forward
        self._device = device
        self._padding_idx = padding_idx
        self._buckets = buckets
        self._capture = capture
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._was_tried = False

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def capture(self) -> None:
        """Capture a graph for each bucket, once; after any failure there are none. Never raises."""
        if self._was_tried:
            return
        self._was_tried = True
        captured: dict[tuple[int, int], _Captured] = {}
        try:
            # The largest first: the others then find their memory in what it leaves.
            for bucket in reversed(self._buckets):
                captured[bucket[:2]] = self._capture_bucket(bucket)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except Exception as error:  # out of memory, an operator that cannot be captured, a wrong result
            reason = next(iter(str(error).splitlines()), "")
            logger.warning("no CUDA graphs, all runs without them: %s: %s", type(error).__name__, reason)
            captured.clear()
            return
        self._captured = captured
        logger.info("CUDA graphs for up to %d tokens: %d", self._buckets[-1].num_rows - 1, len(captured))

    def pad(self, sequences: Sequence[IntArray]) -> Sequence[IntArray]:
        """Fill a batch up to a bucket with sequences after its own, or return it as it is."""
        if not self._captured:
            return sequences
        num_tokens = sum(map(len, sequences))
        place = bisect_right(self._buckets, num_tokens, key=lambda bucket: bucket.num_rows)
        if place == len(self._buckets):
            return sequences
        return fill_up(sequences, self._buckets[place], self._padding_idx) or sequences

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the logits of a batch; of one that was replayed, only until the next call."""
        captured = self._captured.get((len(batch.ids), len(batch.seqlens.lengths)))
        if captured is None or batch.seqlens.max_seqlen > captured.batch.seqlens.max_seqlen:
            return self._forward(batch)
        captured.fill(batch)
        return captured.replay()

    def _capture_bucket(self, bucket: Bucket) -> _Captured:
        # Ids that every vocabulary has.
        first, second = np.array([0, 2, 2, 0, 2], dtype=np.int32), np.array([2, 0, 2], dtype=np.int32)
        batch = self._pack(bucket, [first, second])
        seqlens = Seqlens(batch.seqlens.lengths, batch.seqlens.cu_seqlens.clone(), bucket.max_seqlen)
        static = PackedBatch(batch.ids.clone(), batch.positions.clone(), seqlens)
        captured = _Captured(static, self._capture(lambda: self._forward(static)))
        # Other contents than at the capture: a graph that did not read its buffers would show.
        captured.fill(self._pack(bucket, [second, first, second]))
        expected = self._forward(static).clone()
        torch.testing.assert_close(captured.replay(), expected, rtol=0, atol=_TOLERANCE)
        return captured

    def _pack(self, bucket: Bucket, sequences: list[IntArray]) -> PackedBatch:
        padded = fill_up(sequences, bucket, self._padding_idx)
        assert padded is not None, f"{bucket} cannot hold two short sequences"
        return pack(padded, padding_idx=self._padding_idx, device=self._device)


def fill_up(sequences: Sequence[IntArray], bucket: Bucket, padding_idx: int) -> list[IntArray] | None:
    """Add sequences until a batch has a bucket's shape; None where it does not fit."""
    lengths = [len(sequence) for sequence in sequences]
    filling = np.full(max(bucket.num_rows - sum(lengths), 0), padding_idx, dtype=np.int32)
    longest = bucket.max_seqlen
    fillers = [filling[start : start + longest] for start in range(0, len(filling), longest)]
    num_empty = bucket.num_sequences - len(sequences) - len(fillers)
    if not fillers or num_empty < 0 or max(lengths) > longest:
        return None
    return [*sequences, *[filling[:0]] * num_empty, *fillers]


class CudaCapture:
    """Captures CUDA graphs that share their memory: they are replayed one after the other.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._index = torch.cuda.current_device()
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        """See `Capture`."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # This block also brings the thread's stream back where a capture fails: `torch.cuda.graph` leaves
        # its own in place if ending the capture raises.
        with torch.cuda.stream(stream), self._cleaning_up():
            function()  # libraries make their handles and workspaces at the first call, outside a graph
            # Of this thread only: what others in the process do on the device is no error of ours.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                # Held for as long as the graph is, so that no later capture of the pool gets its memory.
                output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Tell torch's allocator of the end of a capture that failed.

        Where ending it raises, `CUDAGraph.capture_end` returns before it does so itself, and the allocator
        would, for as long as the process lives, free nothing that more than one stream used.
        """
        try:
            yield
        except BaseException:
            with suppress(Exception):  # it knows already
                torch._C._cuda_endAllocateToPool(self._index, self._pool)
                torch._C._cuda_releasePool(self._index, self._pool)
            raise


class _Captured(NamedTuple):
    """A graph and the buffers it reads."""

    batch: PackedBatch
    replay: Replay

    def fill(self, batch: PackedBatch) -> None:
        ours, theirs = self.batch, batch
        ours.ids.copy_(theirs.ids)
        ours.positions.copy_(theirs.positions)
        ours.seqlens.cu_seqlens.copy_(theirs.seqlens.cu_seqlens)
