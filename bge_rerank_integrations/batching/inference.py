"""`Pipeline`: encodes the pairs of a call, queues them and waits for their logits, sync and async."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from bge_rerank_integrations.batching.batcher import MicroBatcher
from bge_rerank_integrations.batching.request import Request
from bge_rerank_integrations.batching.stats import ScorerHealth, ScorerStats
from bge_rerank_integrations.batching.timeouts import (
    Countdown,
    await_future,
    next_item,
    start_countdown,
    wait,
)
from bge_rerank_integrations.batching.workers import Replica
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import (
    CheckpointError,
    QueueFullError,
    RequestTimeoutError,
    RerankError,
    ScorerClosedError,
    UnsupportedCheckpointError,
)
from bge_rerank_integrations.runtime.fork_guard import check_process, mark_process_in_use
from bge_rerank_integrations.runtime.progress import OnProgress, progress_bar
from bge_rerank_integrations.runtime.shutdown import join_until
from bge_rerank_integrations.runtime.tracebacks import raise_if_of_signal_handler
from bge_rerank_integrations.runtime.uninterrupted import import_uninterrupted
from bge_rerank_integrations.runtime.warn_once import warn_once
from bge_rerank_integrations.text.pairs import PreparedPairs
from bge_rerank_integrations.text.token_cache import TokenCache
from bge_rerank_integrations.text.tokenization import IntArray, PairTokenizer
from bge_rerank_integrations.validation import Pair, group_pairs

if TYPE_CHECKING:
    from bge_rerank_integrations.engine.runner import Runner

_logger = logging.getLogger(__name__)

# Threads that tokenize for async callers. The tokenizer itself uses all cores for one call.
_NUM_TOKENIZERS: Final = 2
# 8 MB, enough for about ten thousand passages of a hundred tokens.
_MAX_CACHED_TOKENS: Final = 1 << 21
# What torch says if the memory of a GPU or of the machine is full.
_NO_MEMORY: Final = ("out of memory", "allocate memory", "not enough memory")
_BLANK: Final = (
    "%d of the %d passages of a request are blank. They are not scored and rank last. Set "
    "blank_passages='refuse' to get an error instead. This warning is logged once per process; "
    "Scorer.stats() counts all such passages"
)
_QUERY_CUT: Final = (
    "A query has more than query_max_length=%d tokens and lost its %s. Increase query_max_length, or set "
    "query_truncation_side to choose which end is cut off. This warning is logged once per process; "
    "Scorer.stats() counts all such queries"
)

_NO_BAR: Final = nullcontext[tuple[OnProgress | None, OnProgress | None]]((None, None))


class _Queued(NamedTuple):
    """Pairs that are encoded and queued."""

    pairs: PreparedPairs
    future: Future[list[float]]


class Pipeline:
    """Connects a tokenizer with the queue, and the queue with one device or several.

    Args:
        tokenizer: Converts texts to token ids, in the thread of the caller.
        cache: The cache of the tokenizer.
        runners: Compute logits from token ids, in the worker threads of the queue. There is one per device.
        config: The settings for the queue.
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
        self._query_max_length = config.effective_query_max_length
        self._lost_query_part = "end" if config.query_truncation_side == "right" else "beginning"
        # With a limit on the queue, a request is queued as a whole. A request that does not fit is then
        # rejected before any of it is computed.
        self._is_queued_in_parts = config.max_queued_tokens is None
        self._batcher = MicroBatcher(
            list(map(_replica, runners)),
            max_wait_ms=config.max_wait_ms,
            max_queued_tokens=config.max_queued_tokens,
            is_device_lost=is_device_lost,
        )
        self._executor = ThreadPoolExecutor(_NUM_TOKENIZERS, "bge-rerank-tokenize")

    def run(
        self, pairs: PreparedPairs, *, timeout: float | None = None, progress: bool = False
    ) -> list[float]:
        """Encode and queue pairs, and wait for their logits.

        Args:
            pairs: The pairs of one call. They are encoded here.
            timeout: Maximum duration of the call in seconds. None means no limit.
            progress: Show a progress bar on stderr.

        Returns:
            One logit for each window of the pairs, in order.

        Raises:
            RerankError: For the same reasons as `Scorer.rank`.
        """
        remaining = start_countdown(timeout)
        with progress_bar() if progress else _NO_BAR as (set_total, on_progress):
            request = Request(on_progress)
            try:
                return wait(self._feed(request, pairs, remaining, set_total), remaining())
            except BaseException:
                # Ctrl-C can also come between the two calls. This has no effect on a future that is done.
                request.future.cancel()
                raise

    async def arun(self, pairs: PreparedPairs, *, timeout: float | None = None) -> list[float]:
        """Do the same as `run` without blocking the event loop."""
        remaining = start_countdown(timeout)
        return await await_future(await self._afeed(pairs, remaining), remaining())

    def stream(
        self, chunks: Iterable[list[Pair]], *, timeout: float | None = None, progress: bool = False
    ) -> Generator[tuple[PreparedPairs, list[float]]]:
        """Run lists of pairs one after the other. One list is encoded while the previous one is computed.

        Args:
            chunks: Lists of (query, passage) pairs. They are read one list ahead of the results.
            timeout: Maximum duration in seconds for all lists. None means no limit.
            progress: Show a progress bar on stderr.

        Yields:
            The pairs and the logits of each list, in order.
        """
        remaining = start_countdown(timeout)
        running: _Queued | None = None
        with progress_bar() if progress else _NO_BAR as (_, on_progress):
            try:
                for chunk in chunks:
                    pairs = PreparedPairs(group_pairs(chunk))
                    try:
                        future = self._feed(Request(on_progress), pairs, remaining)
                    except QueueFullError:
                        if running is None:
                            raise
                        yield running.pairs, wait(running.future, remaining())  # it may fill the queue
                        running = None
                        future = self._feed(Request(on_progress), pairs, remaining)
                    finished, running = running, _Queued(pairs, future)
                    if finished is not None:
                        yield finished.pairs, wait(finished.future, remaining())
                if running is not None:
                    yield running.pairs, wait(running.future, remaining())
            finally:
                if running is not None:
                    running.future.cancel()  # has no effect on a future that is done

    async def astream(
        self, chunks: AsyncIterator[list[Pair]], *, timeout: float | None = None
    ) -> AsyncGenerator[tuple[PreparedPairs, list[float]]]:
        """Do the same as `stream` without blocking the event loop."""
        remaining = start_countdown(timeout)
        running: _Queued | None = None
        try:
            while (chunk := await next_item(chunks, remaining)) is not None:
                pairs = PreparedPairs(group_pairs(chunk))
                try:
                    future = await self._afeed(pairs, remaining)
                except QueueFullError:
                    if running is None:
                        raise
                    yield running.pairs, await await_future(running.future, remaining())
                    running = None
                    future = await self._afeed(pairs, remaining)
                finished, running = running, _Queued(pairs, future)
                if finished is not None:
                    yield finished.pairs, await await_future(finished.future, remaining())
            if running is not None:
                yield running.pairs, await await_future(running.future, remaining())
        finally:
            if running is not None:
                running.future.cancel()

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
        """Reject new requests, finish the accepted ones within `timeout` seconds, and release the model.

        If a finalizer calls this in the middle of a call of this thread, another thread does it.
        """
        remaining = start_countdown(timeout)
        if self._batcher.is_in_a_call():
            threading.Thread(target=self.close, args=(timeout,), name="bge-rerank-close").start()
            return
        self._executor.shutdown(wait=False)
        # When the threads have ended, all accepted requests are in the queue. The executor knows a thread
        # before the thread itself runs.
        join_until(self._executor._threads, None if timeout is None else time.monotonic() + timeout)
        self._batcher.close(remaining())
        self.runners = ()

    async def _afeed(self, pairs: PreparedPairs, remaining: Countdown) -> Future[list[float]]:
        """Encode and queue pairs in another thread. Return the future of their logits."""
        # In a forked child the executor takes tasks, but it has no threads.
        check_process()
        request = Request()
        try:
            feeding = self._executor.submit(self._feed, request, pairs, remaining)
        except RuntimeError as error:
            request.future.cancel()  # the executor keeps the task even if it cannot start a thread
            # The message contains "shutdown" if another thread has closed the executor.
            if "shutdown" not in str(error):
                raise
            raise ScorerClosedError from error
        try:
            return await await_future(feeding, remaining())
        except (asyncio.CancelledError, RequestTimeoutError):
            request.future.cancel()  # this also stops the encoding, if it has begun
            raise

    def _feed(
        self,
        request: Request,
        pairs: PreparedPairs,
        remaining: Countdown,
        set_total: OnProgress | None = None,
    ) -> Future[list[float]]:
        """Encode pairs in parts, until all are queued or the request has ended.

        Each part is queued when it is encoded. With `max_queued_tokens`, all parts are queued together at the
        end.

        Returns:
            The future of the request, which gives the logits.
        """
        num_windows = num_tokens = 0
        waiting: list[IntArray] = []
        try:
            # This refuses a call before the work of tokenizing. From here on, `close` waits for it.
            self._batcher.accept(request, num_tokens=min(pairs.num_pairs, 1))
            for windows in pairs.encode(self.tokenizer):
                num_windows += len(windows)
                num_tokens += sum(map(len, windows))
                waiting += windows
                if set_total is not None:
                    set_total(num_windows + pairs.num_left)
                if self._is_queued_in_parts or not pairs.num_left:
                    self._batcher.add(request, waiting, is_last=pairs.num_left == 0)
                    waiting = []
                else:
                    self._batcher.accept(request, num_tokens=num_tokens)
                if pairs.num_left and (request.is_over or remaining() == 0):
                    return request.future  # the caller is about to get an exception or a timeout
        except BaseException:
            request.future.cancel()
            raise
        self._batcher.count(
            duplicates=pairs.num_duplicates,
            truncations=pairs.num_truncated,
            query_truncations=pairs.num_truncated_queries,
            blank_passages=pairs.num_blank,
        )
        if pairs.num_blank:
            warn_once(_logger, _BLANK, pairs.num_blank, pairs.num_pairs)
        if pairs.num_truncated_queries:
            warn_once(_logger, _QUERY_CUT, self._query_max_length, self._lost_query_part)
        return request.future


def load_pipeline(config: ScorerConfig) -> Pipeline:
    """Find, verify and load the model of a config.

    Raises:
        CheckpointError, ConfigError, DeviceError, ForkedProcessError: For the same reasons as `Scorer`.
    """
    check_process()
    # These imports load torch. They are local, so that `import` of a module that mentions `Scorer` stays
    # fast.
    import_uninterrupted("torch")
    from bge_rerank_integrations.engine.checkpoint.locate import find_checkpoint

    folder = find_checkpoint(config)
    try:
        return _load(config, folder)
    except RerankError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:  # a file cannot be read, or the memory is full
        raise_if_of_signal_handler(error)
        message = str(error) or "not enough memory"
        if isinstance(error, RuntimeError) and not any(words in message for words in _NO_MEMORY):
            raise
        raise CheckpointError(f"the model in {folder} cannot be loaded: {message}") from error


def _load(config: ScorerConfig, folder: Path) -> Pipeline:
    from bge_rerank_integrations.engine.checkpoint.files import require_file
    from bge_rerank_integrations.engine.checkpoint.model_config import check_max_length, read_shape
    from bge_rerank_integrations.engine.checkpoint.prompts import read_default_prompt
    from bge_rerank_integrations.engine.runner import is_device_lost, load_runners

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
    if tokenizer.may_give(shape.padding_idx):
        # transformers would skip these tokens when it counts positions.
        raise UnsupportedCheckpointError(
            f"{folder}: pad_token_id {shape.padding_idx} in config.json is the id of a token that texts "
            "contain; tokenizer.json and config.json must belong to the same checkpoint"
        )
    mark_process_in_use()
    return Pipeline(tokenizer, cache, load_runners(config, folder, shape), config, is_device_lost)


def _replica(runner: Runner) -> Replica:
    return Replica(runner.launch, lambda: runner.max_batch_tokens, runner.depth)
