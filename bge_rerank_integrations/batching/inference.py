"""`Pipeline`: encodes a request, queues it and waits for the results, with a sync and an async API."""

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

from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.stats import ScorerHealth, ScorerStats
from bge_rerank_integrations.batching.workers import Replica
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
"""Returns the passages of a ranking that must not be scored, or raises `InputError`."""

_OnProgress = Callable[[int], object]

_logger = logging.getLogger(__name__)

# A longer request is encoded in parts of this many pairs. The device computes a part while the next one is
# encoded.
_NUM_PAIRS_AT_ONCE: Final = 512
# Threads that tokenize for async callers. The tokenizer itself uses all cores for one call.
_NUM_TOKENIZERS: Final = 2
# 8 MB, enough for about ten thousand passages of a hundred tokens.
_MAX_CACHED_TOKENS: Final = 1 << 21
_BLANK: Final = (
    "%d of the %d passages of a request have nothing to read. They are not scored and rank last. Set "
    "blank_passages='refuse' to get an error instead. This warning is logged once per process; "
    "Scorer.stats() counts all such passages"
)
_QUERY_CUT: Final = (
    "A query has more than query_max_length=%d tokens and lost its %s. Increase query_max_length, or set "
    "query_truncation_side to choose which end is cut off. This warning is logged once per process; "
    "Scorer.stats() counts all such queries"
)
_TIMED_OUT: Final = "the call did not finish within its timeout; sequences that had not started were dropped"


class _Begun(NamedTuple):
    """Pairs that are encoded and queued. `start` is the index of the first pair in the whole call."""

    prepared: PreparedPairs
    future: Future[list[float]]
    start: int


class Pipeline:
    """Connects a tokenizer with the queue, and the queue with one device or several.

    Args:
        tokenizer: Converts texts to token ids, in the thread of the caller.
        cache: The cache of the tokenizer.
        runners: Compute logits from token ids, in the worker threads of the queue. There is one per device.
        config: The settings for the queue, and whether to normalize.
        is_device_lost: Returns whether an exception means that the device will not work again.
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
        # With a limit on the queue, a request is encoded in one part. A request that does not fit is then
        # rejected before any of it is computed.
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
        """Score pairs and wait for the results.

        Args:
            pairs: (query, passage) pairs.
            timeout: Maximum duration of the call in seconds. None is no limit.
            progress: Show a progress bar on stderr.
            normalize: Whether to apply a sigmoid to the scores. None uses the config.
            find_blank: Returns the passages that must not be scored. None scores all passages.

        Returns:
            One result for each pair, in order.

        Raises:
            RerankError: For the same reasons as `Scorer.rank`.
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
        """Score lists of pairs one after the other. One list is encoded while the previous one is computed.

        Args:
            chunks: Lists of (query, passage) pairs. They are read one list ahead of the results.
            timeout: Maximum duration in seconds for all lists. None is no limit.
            progress: Show a progress bar on stderr.

        Yields:
            The results of each list, in order.
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
                        yield self._finish(running, remaining())  # its pairs may fill the queue
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
                    running.future.cancel()  # has no effect on a future that is done

    async def ascore(
        self,
        pairs: list[Pair],
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
        find_blank: FindBlank | None = None,
    ) -> list[PairResult]:
        """Do the same as `score` without blocking the event loop."""
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
        """Do the same as `score_stream` without blocking the event loop."""
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
                    yield await self._afinish(running, remaining())  # its pairs may fill the queue
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
        """Do the one-time work of the devices, so that no later request waits for it."""
        self._batcher.check_open()
        for runner in self.runners:
            runner.warmup()

    def stats(self) -> ScorerStats:
        """Return counts and durations since the pipeline was created."""
        return self._batcher.stats(
            cache_hits=self._cache.hits,
            cache_misses=self._cache.misses,
            splits=sum(runner.num_splits for runner in self.runners),
        )

    def health(self) -> ScorerHealth:
        """Return whether the pipeline accepts requests."""
        return self._batcher.health()

    def close(self, timeout: float | None = None) -> None:
        """Reject new requests, finish the accepted ones within `timeout` seconds, and release the model."""
        self._executor.shutdown(wait=True)  # then all accepted requests are in the queue
        self._batcher.close(timeout)
        self.runners = ()

    def _finish(self, begun: _Begun, timeout: float | None) -> list[PairResult]:
        return self._results(begun, _wait(begun.future, timeout))

    async def _afinish(self, begun: _Begun, timeout: float | None) -> list[PairResult]:
        return self._results(begun, await _await(begun.future, timeout))

    def _results(self, begun: _Begun, logits: list[float]) -> list[PairResult]:
        """Return the results of a list. The index of an error counts from the start of the whole call."""
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
        """Encode pairs in another thread and queue them."""
        request = Request()
        try:
            feeding = self._executor.submit(self._feed, request, pairs, remaining, None, find_blank)
        except RuntimeError as error:  # another thread has closed the pipeline
            raise ScorerClosedError("this scorer is closed; create a new one") from error
        try:
            prepared = await _await(feeding, remaining())
        except (asyncio.CancelledError, RequestTimeoutError):
            request.future.cancel()  # this also stops the encoding, if it has begun
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
        """Encode pairs in parts and queue each part, until all are queued or the request has ended."""
        self._batcher.check_open()  # check this before the work of tokenizing
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
                    return prepared  # the caller is about to get an exception, a cancellation or a timeout
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
        CheckpointError, ConfigError, DeviceError, ForkedProcessError: For the same reasons as `Scorer`.
    """
    # These imports load torch. They are local, so that `import` of a module that mentions `Scorer` stays
    # fast.
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
            f"{shape.vocab_size} ids; tokenizer.json and weights must belong to the same checkpoint"
        )
    mark_process_in_use()
    return Pipeline(tokenizer, cache, load_runners(config, folder, shape), config, is_device_lost)


def _replica(runner: Runner) -> Replica:
    return Replica(runner.launch, lambda: runner.max_batch_tokens, runner.depth)


def _countdown(timeout: float | None) -> Callable[[], float | None]:
    """Check a timeout and return a function that gives the remaining seconds, or None without a timeout."""
    check_timeout(timeout)
    if timeout is None:
        return lambda: None
    deadline = time.monotonic() + timeout
    return lambda: max(deadline - time.monotonic(), 0.0)


def _wait(future: Future[T], timeout: float | None) -> T:
    """Wait for a future. When the timeout expires or the thread is interrupted, cancel the future."""
    try:
        return future.result(timeout)
    except FutureTimeoutError:
        if not future.cancel():  # it has ended just now, or its result is a TimeoutError
            return future.result()
        raise RequestTimeoutError(_TIMED_OUT) from None
    except BaseException:  # the thread was interrupted, or the future has failed
        future.cancel()
        raise


async def _await(future: Future[T], timeout: float | None) -> T:
    """Do the same as `_wait` in an asyncio task."""
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
    """Return the next item, or None after the last one."""
    try:
        return await asyncio.wait_for(anext(chunks, None), remaining())
    except asyncio.TimeoutError:
        if remaining() == 0:
            raise RequestTimeoutError(_TIMED_OUT) from None
        raise  # the iterator itself has raised this


async def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a separate thread.

    It is used to read an iterator of the caller, which may take long or wait for the event loop. Reading it
    must block neither the event loop nor the threads that tokenize.
    """
    executor = ThreadPoolExecutor(1, "bge-rerank-read")
    try:
        return await asyncio.wrap_future(executor.submit(function, *args))
    finally:
        executor.shutdown(wait=False)


async def read_in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield the items of an iterator. All of them are read in one separate thread."""
    executor = ThreadPoolExecutor(1, "bge-rerank-read")
    try:
        while (item := await asyncio.wrap_future(executor.submit(next, items, None))) is not None:
            yield item
    finally:
        executor.shutdown(wait=False)


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[tuple[_OnProgress | None, _OnProgress | None]]:
    """Yield two functions: one sets the total of the bar, one advances it. Without a bar, both are None."""
    if not shown:
        yield None, None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="scoring", unit="pair") as bar:

        def set_total(num_pairs: int) -> None:
            bar.total = num_pairs
            bar.refresh()

        yield set_total, bar.update
