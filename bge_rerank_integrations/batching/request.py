"""One caller's sequences on their way to a device."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from bge_rerank_integrations.text.tokenization import IntArray

Batch = dict["Request", list[int]]
"""Which of each request's sequences are in a batch."""


class Request:
    """One caller's sequences; there may come more of them while the first are computed.

    Args:
        on_progress: Called with the number of sequences that a batch finished, by one thread at a time.

    Attributes:
        future: The logits of all sequences, in order; cancelling it drops what has not started.
        sequences: int32 ids of each that has come so far.
        logits: Theirs, as far as they are known.
        num_unfinished: How many are not.
        is_whole: Whether no more will come.
        queued_tokens: Tokens of what has not started.
        submitted_at: When the first came.
        has_started: Whether a batch had any of them.
        is_claimed: Whether somebody is ending it.
        has_lost_device: Whether a device failed over a batch with any of them.
        progress_lock: Held around `on_progress`.
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
        # (length, -index), longest last, to be taken from the end: neighbours in a batch are of like length.
        self._queued: list[tuple[int, int]] = []
        # What came while that waited, each lot in its turn: so that how a request that is alone falls into
        # batches, and with it the last bits of its scores, does not depend on how soon the lots came.
        self._later: deque[list[tuple[int, int]]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether it has its end, or is about to."""
        return self.is_claimed or self.future.done()

    @property
    def is_finished(self) -> bool:
        """Whether all logits are known that there will be."""
        return self.is_whole and self.num_unfinished == 0

    def grow(self, sequences: Sequence[IntArray]) -> range:
        """Take more sequences in and return their indices."""
        if not self.sequences:
            self.submitted_at = time.monotonic()
        indices = range(len(self.sequences), len(self.sequences) + len(sequences))
        self.sequences += sequences
        self.logits += [0.0] * len(sequences)
        self.num_unfinished += len(sequences)
        return indices

    def queue(self, indices: Iterable[int]) -> None:
        """Let sequences wait."""
        lot = sorted((len(self.sequences[index]), -index) for index in indices)
        self.queued_tokens += sum(length for length, _ in lot)
        self._later.append(lot)
        self.turn()

    def turn(self) -> None:
        """Go on to the next lot where nothing is left of the one before; not while a batch is filled."""
        if not self._queued and self._later:
            self._queued = self._later.popleft()

    def take(self, max_tokens: int, *, at_least_one: bool) -> list[int]:
        """Take the longest sequences that fit, or one that does not where one must be taken."""
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
        """Let nothing wait any more."""
        self._queued.clear()
        self._later.clear()
        self.queued_tokens = 0
