"""The way of a request from texts to results: encode, queue, wait, put together; sync and async."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from bge_rerank_integrations.batching.batcher import MicroBatcher, Replica
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.stats import ScorerHealth, ScorerStats
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import (
    NonFiniteScoreError,
    QueueFullError,
    RequestTimeoutError,
    ScorerClosedError,
    UnsupportedCheckpointError,
)
from bge_rerank_integrations.ranking import PairResult
from bge_rerank_integrations.runtime.fork_guard import check_process, mark_process_in_use
from bge_rerank_integrations.runtime.warn_once import warn_once
from bge_rerank_integrations.text.pairs import PreparedPairs
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import PairTokenizer
from bge_rerank_integrations.validation import Pair, check_timeout

if TYPE_CHECKING:
    from bge_rerank_integrations.engine.runner import Runner

T = TypeVar("T")
FindBlank = Callable[[PairTokenizer], frozenset[str]]
"""Looks through a ranking's texts and returns the passages that are not to be scored, or raises."""

_OnProgress = Callable[[int], object]

_logger = logging.getLogger(__name__)

# Of a request with more pairs, the device gets so many as soon as they are encoded, and is busy with them
# while others are.
_NUM_PAIRS_AT_ONCE: Final = 512
# Threads that tokenize for async callers; the tokenizer itself spreads a call over the cores.
_NUM_TOKENIZERS: Final = 2
# 8 MB: some ten thousand passages of a hundred tokens.
_MAX_CACHED_TOKENS: Final = 1 << 21
_BLANK: Final = (
    "%d of the %d passages of a request have nothing to read. They are not scored and come last; "
    "blank_passages='refuse' makes this an error. Logged once per process; Scorer.stats() counts them all"
)
_QUERY_CUT: Final = (
    "A query has more than query_max_length=%d tokens and lost its %s. Raise query_max_length, or choose "
    "which end to cut with query_truncation_side. Logged once per process; Scorer.stats() counts them all"
)
_TIMED_OUT: Final = "not finished within the timeout; what had not started was dropped"


class _Begun(NamedTuple):
    """Pairs that are encoded and queued; `start` is the index of the first in the whole call."""

    prepared: PreparedPairs
    future: Future[list[float]]
    start: int


class Pipeline:
    """A tokenizer, a device or several, and the queue between them.

    Args:
        tokenizer: Texts to ids, in the caller's thread.
        cache: The tokenizer's.
        runners: Ids to logits, in the queue's; one a device.
        config: How to queue, and whether to normalize.
        is_device_lost: Whether an error means that the device will not work again.
    """

    def __init__(
        self,
        tokenizer: PairTokenizer,
        cache: TokenCache,
        runners: Sequence[Runner],
        config: ScorerConfig,
        is_device_lost: Callable[[BaseException], bool],
    ) -> None:
        self.tokenizer = tokenizer
        self.runners = runners
        self._cache = cache
        self._normalize = config.normalize
        self._query_max_length = config.effective_query_max_length
        self._lost_query_part = "end" if config.query_truncation_side == "right" else "beginning"
        # A request that does not fit is refused before any of it is computed, so all of it has to be known.
        self._num_pairs_at_once = _NUM_PAIRS_AT_ONCE if config.max_queued_tokens is None else sys.maxsize
        self._batcher = MicroBatcher(
            list(map(_replica, runners)),
            max_wait_ms=config.max_wait_ms,
            max_queued_tokens=config.max_queued_tokens,
            is_device_lost=is_device_lost,
        )
        self._executor = ThreadPoolExecutor(_NUM_TOKENIZERS, "bge-rerank-tokenize")

    def score(
        self,
        pairs: list[Pair],
        *,
        timeout: float | None = None,
        progress: bool = False,
        normalize: bool | None = None,
        find_blank: FindBlank | None = None,
    ) -> list[PairResult]:
        """Score pairs and wait for it; see `Scorer.score` for the errors.

        Args:
            pairs: (query, passage) pairs.
            timeout: Most seconds to take.
            progress: Show a progress bar on stderr.
            normalize: Put scores through a sigmoid; None is as configured.
            find_blank: Names the passages that are not to be scored; None scores all of them.
        """
        remaining = _countdown(timeout)
        with _progress_bar(shown=progress) as (set_total, on_progress):
            request = Request(on_progress)
            prepared = self._feed(request, pairs, remaining, set_total, find_blank)
            logits = _wait(request.future, remaining())
        return prepared.results(logits, normalize=self._normalize if normalize is None else normalize)

    def score_stream(
        self,
        chunks: Iterable[list[Pair]],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Iterator[list[PairResult]]:
        """Score chunks of pairs as they come: one is read and encoded while another is run.

        Args:
            chunks: Read one ahead of what is given.
            timeout: Most seconds for all of them.
            progress: Show a progress bar on stderr.
        """
        remaining = _countdown(timeout)
        running: _Begun | None = None
        start = 0
        with _progress_bar(shown=progress) as (_, on_progress):

            def begin(pairs: list[Pair]) -> _Begun:
                request = Request(on_progress)
                return _Begun(self._feed(request, pairs, remaining), request.future, start)

            try:
                for pairs in chunks:
                    try:
                        begun = begin(pairs)
                    except QueueFullError:
                        if running is None:
                            raise
                        yield self._finish(running, remaining())  # what fills the queue may be our own
                        running = None
                        begun = begin(pairs)
                    start += len(pairs)
                    if running is not None:
                        finished, running = running, begun
                        yield self._finish(finished, remaining())
                    running = begun
                if running is not None:
                    yield self._finish(running, remaining())
            finally:
                if running is not None:
                    running.future.cancel()  # does nothing to what has ended

    async def ascore(
        self,
        pairs: list[Pair],
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
        find_blank: FindBlank | None = None,
    ) -> list[PairResult]:
        """Score pairs without blocking the event loop; arguments are those of `score`."""
        remaining = _countdown(timeout)
        begun = await self._abegin(pairs, 0, remaining, find_blank)
        logits = await _await(begun.future, remaining())
        return begun.prepared.results(logits, normalize=self._normalize if normalize is None else normalize)

    async def ascore_stream(
        self,
        chunks: AsyncIterator[list[Pair]],
        *,
        timeout: float | None = None,
    ) -> AsyncIterator[list[PairResult]]:
        """Do what `score_stream` does without blocking the event loop."""
        remaining = _countdown(timeout)
        running: _Begun | None = None
        start = 0
        try:
            while (pairs := await _next(chunks, remaining)) is not None:
                try:
                    begun = await self._abegin(pairs, start, remaining)
                except QueueFullError:
                    if running is None:
                        raise
                    yield await self._afinish(running, remaining())  # what fills the queue may be our own
                    running = None
                    begun = await self._abegin(pairs, start, remaining)
                start += len(pairs)
                if running is not None:
                    finished, running = running, begun
                    yield await self._afinish(finished, remaining())
                running = begun
            if running is not None:
                yield await self._afinish(running, remaining())
        finally:
            if running is not None:
                running.future.cancel()

    def warmup(self) -> None:
        """Do what the device does once and no request should wait for."""
        self._batcher.check_open()
        for runner in self.runners:
            runner.warmup()

    def stats(self) -> ScorerStats:
        """Return counts and times so far."""
        return self._batcher.stats(
            cache_hits=self._cache.hits,
            cache_misses=self._cache.misses,
            splits=sum(runner.num_splits for runner in self.runners),
        )

    def health(self) -> ScorerHealth:
        """Return whether requests are taken."""
        return self._batcher.health()

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, finish those accepted, within `timeout` seconds, and let go of the model."""
        self._executor.shutdown(wait=True)  # what was accepted is then in the queue
        self._batcher.close(timeout)
        self.runners = ()

    def _finish(self, begun: _Begun, timeout: float | None) -> list[PairResult]:
        return self._results(begun, _wait(begun.future, timeout))

    async def _afinish(self, begun: _Begun, timeout: float | None) -> list[PairResult]:
        return self._results(begun, await _await(begun.future, timeout))

    def _results(self, begun: _Begun, logits: list[float]) -> list[PairResult]:
        """Return the results of a stream's chunk; an error's index counts from the start of the stream."""
        try:
            return begun.prepared.results(logits, normalize=self._normalize)
        except NonFiniteScoreError as error:
            index = begun.start + (error.index or 0)
            raise NonFiniteScoreError(
                f"the model's score of pair {index} is not finite", index=index
            ) from None

    async def _abegin(
        self,
        pairs: list[Pair],
        start: int,
        remaining: Callable[[], float | None],
        find_blank: FindBlank | None = None,
    ) -> _Begun:
        """Encode and queue pairs in another thread."""
        request = Request()
        try:
            feeding = self._executor.submit(self._feed, request, pairs, remaining, None, find_blank)
        except RuntimeError as error:  # shut down a moment ago
            raise ScorerClosedError("this scorer was closed; make a new one") from error
        try:
            prepared = await _await(feeding, remaining())
        except (asyncio.CancelledError, RequestTimeoutError):
            request.future.cancel()  # which ends the feeding where it has begun
            raise
        return _Begun(prepared, request.future, start)

    def _feed(
        self,
        request: Request,
        pairs: list[Pair],
        remaining: Callable[[], float | None],
        set_total: _OnProgress | None = None,
        find_blank: FindBlank | None = None,
    ) -> PreparedPairs:
        """Encode pairs and hand them to the device, many pairs in parts, while anybody waits for them."""
        self._batcher.check_open()  # before the work of tokenizing for a queue that is full
        blank = frozenset[str]() if find_blank is None else find_blank(self.tokenizer)
        prepared = PreparedPairs(pairs, blank)
        num_windows = 0
        try:
            for windows in prepared.encode(self.tokenizer, self._num_pairs_at_once):
                num_windows += len(windows)
                if set_total is not None:
                    set_total(num_windows + prepared.num_left)
                self._batcher.add(request, windows, is_last=prepared.num_left == 0)
                if prepared.num_left and (request.is_over or remaining() == 0):
                    return prepared  # for an error, a cancellation or a timeout, which is about to be raised
        except BaseException:
            request.future.cancel()
            raise
        self._batcher.count(
            duplicates=prepared.num_duplicates,
            truncations=prepared.num_truncated,
            query_truncations=prepared.num_truncated_queries,
            blank_passages=prepared.num_blank,
        )
        if prepared.num_blank:
            warn_once(_logger, _BLANK, prepared.num_blank, len(prepared.pairs))
        if prepared.num_truncated_queries:
            warn_once(_logger, _QUERY_CUT, self._query_max_length, self._lost_query_part)
        return prepared


def load_pipeline(config: ScorerConfig) -> Pipeline:
    """Find, verify and load the model of a config.

    Raises:
        CheckpointError, ConfigError, DeviceError, ForkedProcessError: As `Scorer` says.
    """
    # Here and not above, so that naming a scorer in a signature does not cost the import of torch.
    from bge_rerank_integrations.engine.checkpoint.files import require_file
    from bge_rerank_integrations.engine.checkpoint.locate import find_checkpoint
    from bge_rerank_integrations.engine.checkpoint.model_config import check_max_length, read_shape
    from bge_rerank_integrations.engine.checkpoint.prompts import read_default_prompt
    from bge_rerank_integrations.engine.runner import is_device_lost, load_runners

    check_process()
    folder = find_checkpoint(config)
    shape = read_shape(folder)
    check_max_length(config, shape)
    cache = TokenCache(_MAX_CACHED_TOKENS)
    tokenizer = PairTokenizer(
        require_file(folder, "tokenizer.json"), config, cache, default_prompt=read_default_prompt(folder)
    )
    if tokenizer.max_id >= shape.vocab_size:
        raise UnsupportedCheckpointError(
            f"{folder}: the tokenizer gives ids up to {tokenizer.max_id}, but the model embeds only "
            f"{shape.vocab_size}; tokenizer.json and weights must be of one checkpoint"
        )
    mark_process_in_use()
    return Pipeline(tokenizer, cache, load_runners(config, folder, shape), config, is_device_lost)


def _replica(runner: Runner) -> Replica:
    return Replica(runner.run, lambda: runner.max_call_tokens)


def _countdown(timeout: float | None) -> Callable[[], float | None]:
    """Check a timeout and return what tells how much of it is left."""
    check_timeout(timeout)
    if timeout is None:
        return lambda: None
    deadline = time.monotonic() + timeout
    return lambda: max(deadline - time.monotonic(), 0.0)


def _wait(future: Future[T], timeout: float | None) -> T:
    """Wait for a future; where that is over before the future is, cancel it."""
    try:
        return future.result(timeout)
    except FutureTimeoutError:
        if not future.cancel():  # it ended at the last moment, or this error is its own
            return future.result()
        raise RequestTimeoutError(_TIMED_OUT) from None
    except BaseException:  # an interrupt of the waiting thread; to what has ended this does nothing
        future.cancel()
        raise


async def _await(future: Future[T], timeout: float | None) -> T:
    """Do what `_wait` does, in a task."""
    wrapped = asyncio.wrap_future(future)
    try:
        done, _ = await asyncio.wait({wrapped}, timeout=timeout)
    except asyncio.CancelledError:
        wrapped.cancel()
        future.cancel()
        raise
    if done:
        return wrapped.result()
    wrapped.cancel()
    future.cancel()
    raise RequestTimeoutError(_TIMED_OUT)


async def _next(chunks: AsyncIterator[T], remaining: Callable[[], float | None]) -> T | None:
    """Return the next chunk, or None after the last."""
    try:
        return await asyncio.wait_for(anext(chunks, None), remaining())
    except asyncio.TimeoutError:
        if remaining() == 0:
            raise RequestTimeoutError(_TIMED_OUT) from None
        raise  # the error is the iterator's own


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread of its own.

    Reading a caller's iterator may take long, or wait for the event loop. It must block neither the loop
    nor the threads that tokenize for others.
    """
    executor = ThreadPoolExecutor(1, "bge-rerank-read")
    try:
        return await asyncio.wrap_future(executor.submit(function, *args))
    finally:
        executor.shutdown(wait=False)


async def read_in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """Give the items of an iterator, each read in the same other thread."""
    executor = ThreadPoolExecutor(1, "bge-rerank-read")
    try:
        while (item := await asyncio.wrap_future(executor.submit(next, items, None))) is not None:
            yield item
    finally:
        executor.shutdown(wait=False)


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[tuple[_OnProgress | None, _OnProgress | None]]:
    """Give what sets the bar's total and what moves it on; both None where none is shown."""
    if not shown:
        yield None, None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="scoring", unit="pair") as bar:

        def set_total(num_pairs: int) -> None:
            bar.total = num_pairs
            bar.refresh()

        yield set_total, bar.update
