"""The sequences of one caller, from the queue to the result."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from bge_rerank_integrations.text.tokenization import IntArray

Batch = dict["Request", list[int]]
"""The sequences of a batch: for each request, the indices of its sequences in the batch."""


class Request:
    """The sequences of one caller. Sequences can be added while earlier ones are computed.

    Args:
        on_progress: Called after each batch with the number of finished sequences. The calls do not overlap.

    Attributes:
        future: Gives the logits of all sequences, in order. Cancelling it drops the sequences that wait.
        sequences: int32 token ids of each sequence that has been added.
        logits: The logit of each sequence, 0.0 until it is known.
        num_unfinished: Number of sequences whose logit is not known yet.
        is_whole: Whether all sequences have been added.
        queued_tokens: Number of tokens of the sequences that wait for a batch.
        submitted_at: Time at which the first sequence was added, by `time.monotonic`.
        has_started: Whether a sequence has been put into a batch.
        is_claimed: Whether a thread has claimed the request, that is, has begun to end it. Only the thread
            that claims a request sets the result or the exception of its future.
        has_lost_device: Whether a device was lost while it computed sequences of this request.
        progress_lock: Held during a call of `on_progress`.
    """

    def __init__(self, on_progress: Callable[[int], object] | None = None) -> None:
        self.on_progress = on_progress
        self.future: Future[list[float]] = Future()
        self.sequences: list[IntArray] = []
        self.logits: list[float] = []
        self.num_unfinished = 0
        self.is_whole = False
        self.queued_tokens = 0
        self.submitted_at = 0.0
        self.has_started = False
        self.is_claimed = False
        self.has_lost_device = False
        self.progress_lock = threading.Lock()
        # (length, -index) of waiting sequences, longest last. Sequences are taken from the end, so that a
        # batch has sequences of similar length.
        self._queued: list[tuple[int, int]] = []
        # Parts of the request that were added while `_queued` was not empty. They are queued one after the
        # other. The batches of a lone request, and the last bits of its scores, then do not depend on when
        # its parts were added.
        self._later: deque[list[tuple[int, int]]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether the request has ended or has been claimed."""
        return self.is_claimed or self.future.done()

    @property
    def is_finished(self) -> bool:
        """Whether all sequences have been added and all their logits are known."""
        return self.is_whole and self.num_unfinished == 0

    def grow(self, sequences: Sequence[IntArray]) -> range:
        """Add sequences and return their indices."""
        if not self.sequences:
            self.submitted_at = time.monotonic()
        indices = range(len(self.sequences), len(self.sequences) + len(sequences))
        self.sequences += sequences
        self.logits += [0.0] * len(sequences)
        self.num_unfinished += len(sequences)
        return indices

    def queue(self, indices: Iterable[int]) -> None:
        """Queue sequences, given by their indices."""
        lot = sorted((len(self.sequences[index]), -index) for index in indices)
        self.queued_tokens += sum(length for length, _ in lot)
        self._later.append(lot)
        self.turn()

    def turn(self) -> None:
        """Queue the next part if the previous one is empty. Do not call this while a batch is filled."""
        if not self._queued and self._later:
            self._queued = self._later.popleft()

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
        self._later.clear()
        self.queued_tokens = 0
