"""`Scorer`: relevance scores and rankings from a loaded cross-encoder, with a sync and an async API."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from typing import ClassVar, Final

from bge_rerank_integrations.batching.async_inputs import aread_pairs, aread_requests
from bge_rerank_integrations.batching.inference import Pipeline, load_pipeline
from bge_rerank_integrations.batching.stats import ScorerHealth, ScorerStats
from bge_rerank_integrations.batching.timeouts import start_countdown
from bge_rerank_integrations.config import (
    DEFAULT_MODEL,
    DEFAULT_WINDOW_OVERLAP,
    BlankPassages,
    DType,
    LongPassages,
    ScorerConfig,
    TruncationSide,
)
from bge_rerank_integrations.errors import ScorerClosedError
from bge_rerank_integrations.protocols import PackageScorer
from bge_rerank_integrations.ranking import Ranking, Selection, check_selection
from bge_rerank_integrations.runtime.fork_guard import call_in_forked_children
from bge_rerank_integrations.runtime.shared_objects import SharedObjects
from bge_rerank_integrations.text.pairs import PreparedPairs
from bge_rerank_integrations.validation import (
    Pair,
    check_pairs,
    check_passages,
    check_query,
    check_requests,
    check_stream,
    check_timeout,
    group_pairs,
    is_single_pair,
)

# Pairs that are read from an iterator at a time. They are enough to fill batches with pairs of similar
# length, and few enough to keep two such lists in memory.
_NUM_STREAMED_PAIRS: Final = 4096


def _make_loaders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, "bge-rerank-load")


class Scorer(PackageScorer):
    """Scores (query, passage) pairs with a BGE reranker or another one-label XLM-RoBERTa cross-encoder.

    A scorer loads one model onto one device, or a copy of it onto each of several devices. Any number of
    threads and asyncio tasks can use it at the same time. Requests that wait in the queue share batches. Each
    request gets the scores that it would get alone, within rounding errors.

    `score`, `rank`, `rank_many` and their asynchronous forms accept a timeout in seconds. When the timeout
    expires or an async call is cancelled, pairs that are not being computed yet are dropped.

    The arguments are the settings of `ScorerConfig`, which describes each of them.

    Raises:
        ConfigError: A setting is invalid, or it does not fit the model.
        CheckpointError: The model cannot be found or used. The message says what to do.
        DeviceError: The device is not available.
        ForkedProcessError: The process was forked from a process that had loaded a model.

    Example:
        >>> with Scorer("embedded") as scorer:
        ...     scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], top_n=1)
        [RankedPassage(index=1, score=..., truncated=False, windows=1, blank=False)]
    """

    # By class and settings, because a subclass may score differently.
    _shared: ClassVar[SharedObjects[tuple[type[Scorer], ScorerConfig], Scorer]] = SharedObjects()
    # Async callers load models in these threads, so that the event loop's default pool stays free.
    _loaders: ClassVar[ThreadPoolExecutor] = _make_loaders()
    # Why the scorer of a pickle could not be loaded.
    _load_error: Exception | None = None

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str = "auto",
        devices: Sequence[str] | None = None,
        dtype: DType = "auto",
        max_length: int = 512,
        query_max_length: int | None = None,
        query_truncation_side: TruncationSide = "right",
        max_batch_tokens: int | None = None,
        num_threads: int | None = None,
        capture_graphs: bool = True,
        max_wait_ms: float = 0.0,
        max_queued_tokens: int | None = None,
        normalize: bool = False,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        long_passages: LongPassages = "truncate",
        window_overlap_tokens: int = DEFAULT_WINDOW_OVERLAP,
        blank_passages: BlankPassages = "last",
    ) -> None:
        self._config = ScorerConfig(
            model=model,
            revision=revision,
            sha256=sha256,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            device=device,
            devices=devices,
            dtype=dtype,
            max_length=max_length,
            query_max_length=query_max_length,
            query_truncation_side=query_truncation_side,
            max_batch_tokens=max_batch_tokens,
            num_threads=num_threads,
            capture_graphs=capture_graphs,
            max_wait_ms=max_wait_ms,
            max_queued_tokens=max_queued_tokens,
            normalize=normalize,
            query_instruction=query_instruction,
            passage_instruction=passage_instruction,
            long_passages=long_passages,
            window_overlap_tokens=window_overlap_tokens,
            blank_passages=blank_passages,
        )
        self._pipeline: Pipeline | None = load_pipeline(self._config)

    @property
    def config(self) -> ScorerConfig:
        """The settings of this scorer. They are immutable."""
        return self._config

    @classmethod
    def from_config(cls, config: ScorerConfig) -> Scorer:
        """Load a new scorer with the settings of a config.

        Example:
            >>> scorer = Scorer.from_config(ScorerConfig(model="embedded", normalize=True))
        """
        return cls(**config.to_dict())  # type: ignore[arg-type]

    @classmethod
    def shared(cls, config: ScorerConfig, holder: object | None = None) -> Scorer:
        """Return the scorer of this class that the process shares for a config. The first call loads it.

        If several threads call this at the same time, the model is loaded once. If loading fails, all of them
        get the exception.

        Args:
            config: The settings.
            holder: The object that uses the scorer. It must call `release` when it no longer needs the
                scorer. Python must be able to take weak references to it. None, the default, keeps the scorer
                loaded until its `close` is called.

        Returns:
            The shared scorer.

        Raises:
            RerankError: The model cannot be loaded; see `Scorer`.

        Example:
            >>> Scorer.shared(ScorerConfig(model="embedded")) is Scorer.shared(ScorerConfig(model="embedded"))
            True
        """
        return cls._shared.get((cls, config), holder, _load)

    @classmethod
    async def ashared(cls, config: ScorerConfig, holder: object | None = None) -> Scorer:
        """Do the same as `shared` without blocking the event loop."""
        ready = cls._shared.get_ready((cls, config), holder)
        if ready is not None:
            return ready
        return await asyncio.get_running_loop().run_in_executor(Scorer._loaders, cls.shared, config, holder)

    @classmethod
    def release(cls, holder: object) -> None:
        """Close the shared scorers that only this holder uses, and those whose holders have been deleted.

        Args:
            holder: The object that was given to `shared`. It may call `shared` again later.
        """
        for unused in cls._shared.release(holder):
            unused.close()

    def score(
        self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None, progress: bool = False
    ) -> list[float]:
        """Score (query, passage) pairs.

        An iterator, such as a generator, is read while its pairs are scored. A million pairs therefore need
        little more memory than their scores. A malformed pair in an iterator raises when it is read.

        Pairs with a blank text are scored too, as by `FlagReranker.compute_score`. Only `rank` and
        `rank_many` treat blank passages differently.

        Args:
            pairs: (query, passage) pairs.
            timeout: Maximum duration of the call in seconds. None means no limit.
            progress: Show a progress bar on stderr.

        Returns:
            One float for each pair, in order: a raw logit, or a number from 0 to 1 if the config normalizes.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which one.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` says for which pair.
            RequestTimeoutError: The call did not finish within its timeout.
            QueueFullError: The request does not fit into the queue under `max_queued_tokens`.
            ScorerClosedError, DeviceLostError, ForkedProcessError: The scorer can no longer be used.
            WorkerDiedError: A worker thread ended unexpectedly. The next call starts a new one.

        Example:
            >>> scores = scorer.score([("what is a panda?", "The giant panda is a bear."), ("hi", "bye")])
            >>> len(scores)
            2
        """
        pipeline = self._require_pipeline()
        if not isinstance(pairs, Iterator):
            return self._score(check_pairs(pairs), timeout, progress, self.config.normalize)
        scores: list[float] = []
        chunks = check_stream(pairs, _NUM_STREAMED_PAIRS)
        with closing(pipeline.stream(chunks, timeout=timeout, progress=progress)) as stream:
            for prepared, logits in stream:
                scores += prepared.scores(logits, normalize=self.config.normalize, start=len(scores))
        return scores

    def compute_score(
        self,
        sentence_pairs: tuple[str, str] | Iterable[tuple[str, str]],
        *,
        normalize: bool | None = None,
        progress: bool = False,
    ) -> list[float]:
        """Score one pair or several pairs, with the signature of `FlagReranker.compute_score`.

        Args:
            sentence_pairs: A (query, passage) pair, or an iterable of pairs.
            normalize: Whether to apply a sigmoid to the scores. None uses the config.
            progress: Show a progress bar on stderr.

        Returns:
            One float for each pair, in order. The result is a list for a single pair too.

        Raises:
            RerankError: For the same reasons as `score`.

        Example:
            >>> (score,) = scorer.compute_score(("what is a panda?", "The giant panda is a bear."))
        """
        pairs = [sentence_pairs] if is_single_pair(sentence_pairs) else sentence_pairs
        selection = self._select(None, None, normalize)
        return self._score(check_pairs(pairs), None, progress, selection.normalize)

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
        normalize: bool | None = None,
    ) -> Ranking:
        """Rank passages by their relevance to a query.

        The model does not score a passage that is blank. The setting `blank_passages` decides
        whether such a passage ranks last or raises an exception.

        Args:
            query: The query.
            passages: The texts to rank.
            top_n: Maximum number of passages to return, including blank ones. None returns all, 0 returns
                none.
            threshold: Minimum score to return, inclusive. It is on the same scale as the scores: above 0 and
                at most 1 with normalization, any finite number without. None returns every passage.
            timeout: Maximum duration of the call in seconds. None means no limit.
            progress: Show a progress bar on stderr.
            normalize: Whether to apply a sigmoid to the scores. None uses the config.

        Returns:
            A list of `RankedPassage`, best first. Passages are sorted by raw logit. Passages with equal
            logits stay in input order.

        Raises:
            InputError: An argument has the wrong type or is out of range, the query is blank, or a passage is
                blank and the config refuses blank passages; `.index` says which passage.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` says for which passage.
            RerankError: For the same reasons as `score`.

        Example:
            >>> ranking = scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."])
            >>> ranking[0].index
            1
        """
        selection = self._select(top_n, threshold, normalize)
        prepared = self._prepare(query, passages)
        logits = self._require_pipeline().run(prepared, timeout=timeout, progress=progress)
        return prepared.rankings(logits, selection)[0]

    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Rank the passages of several queries. One call fills batches better than one call per query.

        Args:
            requests: (query, passages) of each request.
            top_n: As in `rank`, for each request.
            threshold: As in `rank`, for each request.
            timeout: Maximum duration of the whole call in seconds. None means no limit.
            progress: Show a progress bar on stderr.
            normalize: As in `rank`.

        Returns:
            One ranking for each request, in order.

        Raises:
            InputError: For the same reasons as `rank`; `.index` says which request.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` is the position of the passage,
                counted over the passages of all requests.
            RerankError: For the same reasons as `score`.

        Example:
            >>> rankings = scorer.rank_many([("panda", ["a bear", "a tea"]), ("tea", ["a cup of tea"])])
            >>> [len(ranking) for ranking in rankings]
            [2, 1]
        """
        remaining = start_countdown(timeout)
        selection = self._select(top_n, threshold, normalize)
        prepared = self._prepare_each(check_requests(requests))
        logits = self._require_pipeline().run(prepared, timeout=remaining(), progress=progress)
        return prepared.rankings(logits, selection)

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]],
        *,
        timeout: float | None = None,
    ) -> list[float]:
        """Do the same as `score` without blocking the event loop.

        An iterator is read in a separate thread, and an asynchronous iterator in the caller's task. Both are
        read while their pairs are scored. On Python 3.10, a call with a timeout reads each item of an
        asynchronous iterator in a separate task.
        """
        pipeline = self._require_pipeline()
        if not isinstance(pairs, Iterator | AsyncIterable):
            prepared = PreparedPairs(group_pairs(check_pairs(pairs)))
            logits = await pipeline.arun(prepared, timeout=timeout)
            return prepared.scores(logits, normalize=self.config.normalize)
        scores: list[float] = []
        async with (
            aclosing(aread_pairs(pairs, _NUM_STREAMED_PAIRS)) as chunks,
            aclosing(pipeline.astream(chunks, timeout=timeout)) as stream,
        ):
            async for prepared, logits in stream:
                scores += prepared.scores(logits, normalize=self.config.normalize, start=len(scores))
        return scores

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> Ranking:
        """Do the same as `rank` without blocking the event loop."""
        selection = self._select(top_n, threshold, normalize)
        prepared = self._prepare(query, passages)
        logits = await self._require_pipeline().arun(prepared, timeout=timeout)
        return prepared.rankings(logits, selection)[0]

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do the same as `rank_many` without blocking the event loop.

        An iterator is read in a separate thread.
        """
        remaining = start_countdown(timeout)
        selection = self._select(top_n, threshold, normalize)
        prepared = self._prepare_each(await aread_requests(requests, remaining))
        logits = await self._require_pipeline().arun(prepared, timeout=remaining())
        return prepared.rankings(logits, selection)

    def warmup(self) -> None:
        """Do all one-time work now, so that no later request waits for it.

        While the model loads, kernels are chosen and CUDA graphs are captured. This call scores one short and
        one long pair, which triggers the one-time work of libraries.

        Raises:
            RerankError: For the same reasons as `score`.
        """
        self.score([("warm up", "short"), ("warm up", "long " * self.config.max_length)])

    async def awarmup(self) -> None:
        """Do the same as `warmup` without blocking the event loop."""
        await asyncio.get_running_loop().run_in_executor(Scorer._loaders, self.warmup)

    def stats(self) -> ScorerStats:
        """Return counts and durations since the scorer was created.

        Raises:
            ScorerClosedError: The scorer is closed.

        Example:
            >>> scorer.stats().failed
            0
        """
        return self._require_pipeline().stats()

    def health(self) -> ScorerHealth:
        """Return whether the scorer accepts requests, and how many wait. This works for a closed scorer too.

        Example:
            >>> scorer.health().state
            'ok'
        """
        pipeline = self._pipeline
        if pipeline is None:
            return ScorerHealth("closed", 0, 0, len(self.config.per_device()), 0)
        return pipeline.health()

    def close(self, timeout: float | None = None) -> None:
        """Reject new calls, finish the accepted ones and release the model. It is safe to call this twice.

        A call that reads an iterator raises `ScorerClosedError` if it reads more pairs.

        Args:
            timeout: Maximum time in seconds to finish accepted requests. When it is over, the remaining
                requests raise `ScorerClosedError`. None means no limit.

        Raises:
            InputError: The timeout is not a number of seconds in its range. Nothing is closed.
        """
        check_timeout(timeout)
        Scorer._shared.discard((type(self), self.config), self)
        pipeline = self._pipeline
        if pipeline is not None:
            pipeline.close(timeout)
        self._pipeline = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        pipeline = self._pipeline
        devices = [] if pipeline is None else [str(runner.device) for runner in pipeline.runners]
        return f"Scorer(model={self.config.model!r}, {', '.join(devices) or 'closed'})"

    # A pickle contains the settings only, and another process loads its own model.
    def __reduce__(self) -> tuple[Callable[..., Scorer], tuple[type[Scorer], ScorerConfig]]:
        return _unpickle, (type(self), self.config)

    def _select(self, top_n: int | None, threshold: float | None, normalize: bool | None) -> Selection:
        scale = self.config.normalize if normalize is None else normalize
        return check_selection(top_n, threshold, normalize=scale)

    def _score(
        self, pairs: list[Pair], timeout: float | None, progress: bool, normalize: bool
    ) -> list[float]:
        prepared = PreparedPairs(group_pairs(pairs))
        logits = self._require_pipeline().run(prepared, timeout=timeout, progress=progress)
        return prepared.scores(logits, normalize=normalize)

    def _prepare(self, query: str, passages: Sequence[str]) -> PreparedPairs:
        texts = check_passages(passages)
        return PreparedPairs([(check_query(query), texts)], blank_passages=self.config.blank_passages)

    def _prepare_each(self, requests: list[tuple[str, list[str]]]) -> PreparedPairs:
        blank_passages = self.config.blank_passages
        return PreparedPairs(requests, blank_passages=blank_passages, names_request=True)

    def _require_pipeline(self) -> Pipeline:
        pipeline = self._pipeline
        if pipeline is None:
            if self._load_error is not None:
                raise copy.copy(self._load_error)  # callers must not share an exception and its traceback
            raise ScorerClosedError
        return pipeline


def _unpickle(kind: type[Scorer], config: ScorerConfig) -> Scorer:
    """Return the shared scorer for the settings in a pickle. If it cannot load, its calls raise the error.

    If a worker of `multiprocessing.Pool` raises an exception while it reads its task, it ends, and the caller
    waits for ever.
    """
    try:
        return kind.shared(config)
    except Exception as error:
        scorer = kind.__new__(kind)
        scorer._config = config
        scorer._pipeline = None
        # A copy has no traceback and no cause, which would keep the memory of the failed attempt.
        scorer._load_error = copy.copy(error)
        return scorer


def _load(key: tuple[type[Scorer], ScorerConfig]) -> Scorer:
    kind, config = key
    return kind.from_config(config)


def _renew_loaders() -> None:
    """Replace the executor in a forked child, where it takes tasks, but has no threads."""
    Scorer._loaders = _make_loaders()


call_in_forked_children(_renew_loaders)
