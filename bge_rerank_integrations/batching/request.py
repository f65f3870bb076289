"""The sequences of one caller, from the queue to the result."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import Enum, auto

from bge_rerank_integrations.runtime.locks import SafeFuture, SafeLock
from bge_rerank_integrations.text.tokenization import IntArray

Batch = dict["Request", list[int]]
"""The sequences of a batch: for each request, the indices of its sequences in the batch."""


class State(Enum):
    """The state of a request. A request only moves to a later state, or stays in its state."""

    GROWING = auto()
    """More sequences may be added."""
    WHOLE = auto()
    """All sequences have been added."""
    ENDED = auto()
    """A thread has set the result or the exception of the future, or is about to do it."""


class Request:
    """The sequences of one caller. Sequences can be added while earlier ones are computed.

    Apart from `future`, which has a lock of its own, `MicroBatcher` uses a request under its lock.

    Args:
        on_progress: Called after each batch with the number of finished sequences. The calls do not overlap.

    Attributes:
        future: Gives the logits of all sequences, in order. Cancelling it drops the sequences that wait.
        state: Only the thread that moves a request to `State.ENDED` sets the result or the exception of its
            future.
        sequences: int32 token ids of each sequence that has been added.
        logits: The logit of each sequence, 0.0 until it is known.
        num_unfinished: Number of sequences whose logit is not known yet.
        queued_tokens: Number of tokens of the sequences that wait for a batch.
        submitted_at: Time at which the first sequence was added, by `time.monotonic`.
        started_at: Time at which a sequence was first put into a batch; None before that.
        num_lost_devices: Number of devices that were lost while they computed sequences of this request.
        runs_alone: Whether no other request may share the next batch with this one, because a batch that
            they shared has failed.
        progress_lock: Held during a call of `on_progress`.
    """

    def __init__(self, on_progress: Callable[[int], object] | None = None) -> None:
        self.on_progress = on_progress
        self.future: Future[list[float]] = SafeFuture()
        self.state = State.GROWING
        self.sequences: list[IntArray] = []
        self.logits: list[float] = []
        self.num_unfinished = 0
        self.queued_tokens = 0
        self.submitted_at = 0.0
        self.started_at: float | None = None
        self.num_lost_devices = 0
        self.runs_alone = False
        self.progress_lock = SafeLock()
        # (length, -index) of waiting sequences, longest last. Sequences are taken from the end, so that a
        # batch has sequences of similar length.
        self._queued: list[tuple[int, int]] = []
        # Parts of the request that were added while `_queued` was not empty. They are queued one after the
        # other. The batches of a lone request, and the last bits of its scores, then do not depend on when
        # its parts were added.
        self._later_parts: deque[list[tuple[int, int]]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether the request has ended, is about to end, or was cancelled."""
        return self.state is State.ENDED or self.future.done()

    @property
    def has_all_logits(self) -> bool:
        """Whether the logits of all its sequences are known and the request has not ended yet."""
        return self.state is State.WHOLE and self.num_unfinished == 0

    def end(self) -> bool:
        """Move to `State.ENDED`. Return whether this call did it, and the caller must set the future."""
        if self.state is State.ENDED:
            return False
        self.state = State.ENDED
        return True

    def grow(self, sequences: Sequence[IntArray]) -> range:
        """Add sequences and return their indices."""
        if not self.sequences:
            self.submitted_at = time.monotonic()
        indices = range(len(self.sequences), len(self.sequences) + len(sequences))
        self.sequences += sequences
        self.logits += [0.0] * len(sequences)
        self.num_unfinished += len(sequences)
        return indices

    def record(self, logits: dict[int, float]) -> None:
        """Store logits, given by the indices of their sequences."""
        for index, logit in logits.items():
            self.logits[index] = logit
        self.num_unfinished -= len(logits)

    def queue(self, indices: Iterable[int]) -> None:
        """Queue new sequences, given by their indices."""
        part = sorted(map(self._entry, indices))
        self.queued_tokens += sum(length for length, _ in part)
        self._later_parts.append(part)
        self.start_next_part()

    def put_back(self, indices: Iterable[int]) -> None:
        """Queue sequences again that were taken for a batch. They come before later parts of the request."""
        for entry in map(self._entry, indices):
            self.queued_tokens += entry[0]
            insort(self._queued, entry)

    def start_next_part(self) -> None:
        """Queue the next part if the previous one is empty. Do not call this while a batch is filled."""
        if not self._queued and self._later_parts:
            self._queued = self._later_parts.popleft()

    def take(self, max_tokens: int, *, at_least_one: bool) -> list[int]:
        """Take the longest sequences that fit. With `at_least_one`, take one even if it does not fit."""
        taken: list[int] = []
        while self._queued:
            length, negative_index = self._queued[-1]
            if length > max_tokens and (taken or not at_least_one):
                break
            self._queued.pop()
            taken.append(-negative_index)
            self.queued_tokens -= length
            max_tokens -= length
        return taken

    def clear(self) -> None:
        """Remove all waiting sequences."""
        self._queued.clear()
        self._later_parts.clear()
        self.queued_tokens = 0

    def _entry(self, index: int) -> tuple[int, int]:
        return len(self.sequences[index]), -index
