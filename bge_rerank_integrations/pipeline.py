"""The way of a request from texts to results: encode, queue, wait, put together; sync and async."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import (
    QueueFullError,
    RequestTimeoutError,
    ScorerClosedError,
    UnsupportedCheckpointError,
)
from bge_rerank_integrations.inputs import check_timeout
from bge_rerank_integrations.pairs import PairResult, PreparedPairs, prepare
from bge_rerank_integrations.process import check_process, mark_process_in_use
from bge_rerank_integrations.scheduler import MicroBatcher
from bge_rerank_integrations.stats import ScorerHealth, ScorerStats
from bge_rerank_integrations.token_cache import TokenCache
from bge_rerank_integrations.tokenization import PairTokenizer

if TYPE_CHECKING:
    from bge_rerank_integrations.engine.runner import Runner

T = TypeVar("T")
_OnProgress = Callable[[int], object]

# Threads that tokenize for async callers; the tokenizer itself spreads a call over the cores.
_NUM_TOKENIZERS: Final = 2
# 8 MB: some ten thousand passages of a hundred tokens.
_MAX_CACHED_TOKENS: Final = 1 << 21
_TIMED_OUT: Final = "not finished within the timeout; what had not started was dropped"


class Pipeline:
    """A tokenizer, a device and the queue between them.

    Args:
        tokenizer: Texts to ids, in the caller's thread.
        cache: The tokenizer's.
        runner: Ids to logits, in the queue's.
        config: How to queue, and whether to normalize.
        is_device_lost: Whether an error means that the device will not work again.
    """

    def __init__(
        self,
        tokenizer: PairTokenizer,
        cache: TokenCache,
        runner: Runner,
        config: ScorerConfig,
        is_device_lost: Callable[[BaseException], bool],
    ) -> None:
        self.tokenizer = tokenizer
        self.runner = runner
        self._cache = cache
        self._normalize = config.normalize
        self._batcher = MicroBatcher(
            runner.run,
            lambda: runner.max_call_tokens,
            max_wait_ms=config.max_wait_ms,
            max_queued_tokens=config.max_queued_tokens,
            is_device_lost=is_device_lost,
        )
        self._executor = ThreadPoolExecutor(_NUM_TOKENIZERS, "bge-rerank-tokenize")

    def score(
        self,
        queries: list[str],
        passages: list[str],
        *,
        timeout: float | None = None,
        progress: bool = False,
        normalize: bool | None = None,
    ) -> list[PairResult]:
        """Score `zip(queries, passages)` and wait for it; see `Scorer.score` for the errors."""
        remaining = _countdown(timeout)
        with _progress_bar(shown=progress) as (set_total, on_progress):
            prepared, future = self._begin(queries, passages, set_total, on_progress)
            logits = _wait(future, remaining())
        return prepared.results(logits, normalize=self._normalize if normalize is None else normalize)

    def score_stream(
        self,
        chunks: Iterable[tuple[list[str], list[str]]],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Iterator[list[PairResult]]:
        """Score chunks of (queries, passages) as they come: one is read and encoded while another is run.

        Args:
            chunks: Read one ahead of what is given.
            timeout: Most seconds for all of them.
            progress: Show a progress bar on stderr.
        """
        remaining = _countdown(timeout)
        running: tuple[PreparedPairs, Future[list[float]]] | None = None
        with _progress_bar(shown=progress) as (_, on_progress):
            try:
                for queries, passages in chunks:
                    try:
                        begun = self._begin(queries, passages, None, on_progress)
                    except QueueFullError:
                        if running is None:
                            raise
                        yield self._finish(running, remaining())  # what fills the queue may be our own
                        running = None
                        begun = self._begin(queries, passages, None, on_progress)
                    if running is not None:
                        finished, running = running, begun
                        yield self._finish(finished, remaining())
                    running = begun
                if running is not None:
                    yield self._finish(running, remaining())
            finally:
                if running is not None:
                    running[1].cancel()  # does nothing to what has ended

    async def ascore(
        self, queries: list[str], passages: list[str], *, timeout: float | None = None
    ) -> list[PairResult]:
        """Score `zip(queries, passages)` without blocking the event loop."""
        remaining = _countdown(timeout)
        try:
            beginning = self._executor.submit(self._begin, queries, passages)
        except RuntimeError as error:  # shut down a moment ago
            raise ScorerClosedError("this scorer was closed; make a new one") from error
        try:
            prepared, future = await _await(beginning, remaining())
        except (asyncio.CancelledError, RequestTimeoutError):
            # A thread that is tokenizing cannot be stopped, but what it goes on to submit can.
            beginning.add_done_callback(_cancel_begun)
            raise
        logits = await _await(future, remaining())
        return prepared.results(logits, normalize=self._normalize)

    def warmup(self) -> None:
        """Do what the device does once and no request should wait for."""
        self._batcher.check_open()
        self.runner.warmup()

    def stats(self) -> ScorerStats:
        """Return counts and times so far."""
        return self._batcher.stats(cache_hits=self._cache.hits, splits=self.runner.num_splits)

    def health(self) -> ScorerHealth:
        """Return whether requests are taken."""
        return self._batcher.health()

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests and finish those accepted, within `timeout` seconds if it is given."""
        self._executor.shutdown(wait=True)  # what was accepted is then in the queue
        self._batcher.close(timeout)

    def _finish(
        self, begun: tuple[PreparedPairs, Future[list[float]]], timeout: float | None
    ) -> list[PairResult]:
        prepared, future = begun
        logits = _wait(future, timeout)
        return prepared.results(logits, normalize=self._normalize)

    def _begin(
        self,
        queries: list[str],
        passages: list[str],
        set_total: _OnProgress | None = None,
        on_progress: _OnProgress | None = None,
    ) -> tuple[PreparedPairs, Future[list[float]]]:
        """Encode pairs and hand them to the device."""
        self._batcher.check_open()  # before the work of tokenizing for a queue that is full
        prepared = prepare(self.tokenizer, queries, passages)
        windows = prepared.windows
        if set_total is not None:
            set_total(len(windows))
        future = self._batcher.submit(windows, on_progress)
        self._batcher.count(duplicates=prepared.num_duplicates, truncations=prepared.num_truncated)
        return prepared, future


def load_pipeline(config: ScorerConfig) -> Pipeline:
    """Find, verify and load the model of a config.

    Raises:
        CheckpointError, ConfigError, DeviceError, ForkedProcessError: As `Scorer` says.
    """
    # Here and not above, so that naming a scorer in a signature does not cost the import of torch.
    from bge_rerank_integrations.engine.checkpoint import (
        check_max_length,
        find_checkpoint,
        read_shape,
        require_file,
    )
    from bge_rerank_integrations.engine.runner import is_device_lost, load_runner

    check_process()
    folder = find_checkpoint(config)
    shape = read_shape(folder)
    check_max_length(config, shape)
    cache = TokenCache(_MAX_CACHED_TOKENS)
    tokenizer = PairTokenizer(require_file(folder, "tokenizer.json"), config, cache)
    if tokenizer.max_id >= shape.vocab_size:
        raise UnsupportedCheckpointError(
            f"{folder}: the tokenizer gives ids up to {tokenizer.max_id}, but the model embeds only "
            f"{shape.vocab_size}; tokenizer.json and weights must be of one checkpoint"
        )
    mark_process_in_use()
    return Pipeline(tokenizer, cache, load_runner(config, folder, shape), config, is_device_lost)


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


def _cancel_begun(beginning: Future[tuple[PreparedPairs, Future[list[float]]]]) -> None:
    if not beginning.cancelled() and beginning.exception() is None:
        beginning.result()[1].cancel()


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[tuple[_OnProgress | None, _OnProgress | None]]:
    """Give what sets the bar's total and what moves it on; both None where none is shown."""
    if not shown:
        yield None, None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="scoring", unit="pair") as bar:
        yield bar.reset, bar.update
