"""`Scorer`: relevance scores and rankings from one loaded cross-encoder, sync and async."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final, Protocol, runtime_checkable
from weakref import WeakValueDictionary

from bge_rerank_integrations.batching.inference import (
    FindBlank,
    Pipeline,
    load_pipeline,
    read_in_thread,
    run_in_thread,
)
from bge_rerank_integrations.batching.stats import ScorerHealth, ScorerStats
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
from bge_rerank_integrations.ranking import (
    RankedPassage,
    Ranking,
    check_threshold,
    check_top_n,
    rank_each,
    rank_results,
)
from bge_rerank_integrations.text.pairs import find_blank, find_blank_in_each
from bge_rerank_integrations.validation import (
    Pair,
    acheck_stream,
    check_pairs,
    check_passages,
    check_query,
    check_requests,
    check_stream,
    is_single_pair,
)

# Of a stream: enough to fill batches with pairs of like lengths, few enough to be held twice over.
_NUM_STREAMED_PAIRS: Final = 4096


@runtime_checkable
class SupportsRank(Protocol):
    """What the framework adapters need of a scorer."""

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> Sequence[RankedPassage]:
        """Rank passages, best first; see `Scorer.rank`.

        A scorer of one's own decides by itself what it does with passages that have nothing to read. Adapters
        mark what it marks with `RankedPassage.blank` and `RankedPassage.truncated`.
        """

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> Sequence[RankedPassage]:
        """Rank passages without blocking the event loop; see `Scorer.arank`."""


@dataclass
class _Shared:
    """A scorer in the process's registry and who uses it.

    Attributes:
        future: The scorer, once it is loaded.
        holders: Those who use it, by `id`. They are held weakly, so that one that is gone counts no more.
        is_pinned: Somebody unknown has it too, so that only a call of its `close()` may close it.
    """

    future: Future[Scorer] = field(default_factory=Future)
    holders: WeakValueDictionary[int, object] = field(default_factory=WeakValueDictionary)
    is_pinned: bool = False

    def add(self, holder: object | None) -> None:
        if holder is None:
            self.is_pinned = True
        else:
            self.holders[id(holder)] = holder


class Scorer:
    """Scores (query, passage) pairs with a BGE reranker or another one-label XLM-RoBERTa cross-encoder.

    One scorer holds one model, on one device or a copy on each of several. Any number of threads and tasks
    may use it at once: what is waiting shares batches, and each gets what it would get alone. Settings are
    those of `ScorerConfig`, where each is explained.

    Every call that scores takes a `timeout` in seconds, None being no limit. When it is over, or an async
    call is cancelled, what has not started is dropped and never computed.

    Raises:
        ConfigError: A setting cannot work, alone or with this model.
        CheckpointError: The model cannot be found or used; the message says what to do.
        DeviceError: The device is not available.

    Example:
        >>> with Scorer("BAAI/bge-reranker-base") as scorer:
        ...     scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], top_n=1)
        [RankedPassage(index=1, score=..., truncated=False, windows=1, blank=False)]
    """

    _shared: ClassVar[dict[ScorerConfig, _Shared]] = {}
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()
    # Models load here for callers that must not block; the loop's default pool is others' business.
    _loaders: ClassVar[ThreadPoolExecutor] = ThreadPoolExecutor(2, "bge-rerank-load")

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
        """The settings, immutable."""
        return self._config

    @classmethod
    def from_config(cls, config: ScorerConfig) -> Scorer:
        """Load a scorer of one's own with the settings of a config."""
        return cls(**config.to_dict())  # type: ignore[arg-type]

    @classmethod
    def shared(cls, config: ScorerConfig, holder: object | None = None) -> Scorer:
        """Return the process's one scorer with these settings, loading it if nobody has.

        However many threads ask at once, the model is loaded once, and if that fails each of them gets
        the error.

        Args:
            config: The settings.
            holder: The object that uses the scorer, and will call `release` when it no longer does. None,
                the default, keeps the scorer loaded until somebody calls its `close()`.
        """
        with cls._shared_lock:
            shared = cls._shared.get(config)
            is_first = shared is None
            if shared is None:
                shared = cls._shared[config] = _Shared()
            shared.add(holder)
        if is_first:
            try:
                shared.future.set_result(cls.from_config(config))
            except BaseException as error:
                with cls._shared_lock:
                    if cls._shared.get(config) is shared:
                        del cls._shared[config]
                shared.future.set_exception(error)
        try:
            return shared.future.result()
        finally:
            # A failed load's error refers to this frame. Without the reference back, what the load had
            # in memory is freed with the error.
            del shared

    @classmethod
    async def ashared(cls, config: ScorerConfig, holder: object | None = None) -> Scorer:
        """Return what `shared` returns; a model that is not loaded yet is loaded off the event loop."""
        with cls._shared_lock:
            shared = cls._shared.get(config)
            if shared is not None and shared.future.done():
                shared.add(holder)
                return shared.future.result()
        return await asyncio.get_running_loop().run_in_executor(cls._loaders, cls.shared, config, holder)

    @classmethod
    def release(cls, holder: object) -> None:
        """Close the shared scorers that this holder uses and nobody else.

        Args:
            holder: What was given to `shared`. It may use shared scorers again later.
        """
        unused = []
        with cls._shared_lock:
            for config, shared in list(cls._shared.items()):
                is_held = shared.holders.pop(id(holder), None) is not None
                if is_held and not shared.holders and not shared.is_pinned:
                    unused.append(cls._shared.pop(config).future)
        for future in unused:
            if future.exception() is None:
                future.result().close()

    def score(
        self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None, progress: bool = False
    ) -> list[float]:
        """Score pairs.

        An iterator, such as a generator, is read as it is scored, so that a million pairs need no more
        memory than their scores do; a pair of it that is malformed ends the call when its turn comes.

        Every pair is scored, also one with a blank text, as `FlagReranker.compute_score` does it. Only `rank`
        and `rank_many` can put a blank passage last.

        Args:
            pairs: (query, passage) pairs.
            timeout: Most seconds to take; None is no limit.
            progress: Show a progress bar on stderr.

        Returns:
            One float a pair, in order: the raw logit, or 0..1 if the config normalizes.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` says for which pair.
            RequestTimeoutError: The timeout was over.
            QueueFullError: More is waiting than `max_queued_tokens` allows.
            ScorerClosedError, DeviceLostError, ForkedProcessError: The scorer cannot be used any more.
        """
        pipeline = self._require_pipeline()
        if isinstance(pairs, Iterator):
            stream = pipeline.score_stream(
                check_stream(pairs, _NUM_STREAMED_PAIRS), timeout=timeout, progress=progress
            )
            return [result.score for results in stream for result in results]
        results = pipeline.score(check_pairs(pairs), timeout=timeout, progress=progress)
        return [result.score for result in results]

    def compute_score(
        self,
        sentence_pairs: tuple[str, str] | Iterable[tuple[str, str]],
        *,
        normalize: bool | None = None,
        progress: bool = False,
    ) -> list[float]:
        """Score one pair or a list of pairs, blank texts too, as `FlagReranker.compute_score`; always a list.

        Args:
            sentence_pairs: One (query, passage) pair, or pairs.
            normalize: Put scores through a sigmoid or not; None is as configured.
            progress: Show a progress bar on stderr.

        Raises:
            RerankError: As `score` does.
        """
        pairs = [sentence_pairs] if is_single_pair(sentence_pairs) else sentence_pairs
        checked = check_pairs(pairs)
        results = self._require_pipeline().score(checked, progress=progress, normalize=normalize)
        return [result.score for result in results]

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

        A passage with nothing to read is not scored: it comes last, or is refused, as `blank_passages` says.

        Args:
            query: The query.
            passages: Texts to rank.
            top_n: Most passages to return, blank ones included; None is all, 0 is none.
            threshold: Least score to return, inclusive, on the scale of the scores: above 0 and at most 1 if
                the config normalizes, else any finite number. None returns every passage.
            timeout: Most seconds to take; None is no limit.
            progress: Show a progress bar on stderr.
            normalize: Put scores through a sigmoid or not; None is as configured. The threshold is on the
                scale of the scores.

        Returns:
            A list of `RankedPassage`, best first. The order is that of the raw logits; equal ones keep input
            order.

        Raises:
            InputError: An argument is of the wrong type or out of range, the query is blank, or a passage is
                and the config refuses that; `.index` says which passage.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` says for which passage.
            RerankError: Otherwise, as `score` does.
        """
        check_top_n(top_n)
        check_threshold(threshold, normalize=self._normalizes(normalize))
        texts = check_passages(passages)
        check_query(query)
        results = self._require_pipeline().score(
            [(query, text) for text in texts],
            timeout=timeout,
            progress=progress,
            normalize=normalize,
            find_blank=self._find_blank(query, texts),
        )
        return rank_results(results, top_n, threshold)

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
        """Rank the passages of several queries in one pass, which fills batches better than many calls.

        Args:
            requests: (query, passages) of each request.
            top_n: As in `rank`, for each request.
            threshold: As in `rank`, for each request.
            timeout: Most seconds to take for all; None is no limit.
            progress: Show a progress bar on stderr.
            normalize: As in `rank`.

        Returns:
            One ranking a request, in order.

        Raises:
            InputError: As `rank` does; `.index` says which request.
            NonFiniteScoreError: As `rank` does; `.index` counts passages through all requests.
            RerankError: Otherwise, as `score` does.
        """
        check_top_n(top_n)
        check_threshold(threshold, normalize=self._normalizes(normalize))
        checked = check_requests(requests)
        results = self._require_pipeline().score(
            _flatten(checked),
            timeout=timeout,
            progress=progress,
            normalize=normalize,
            find_blank=self._find_blank_in_each(checked),
        )
        return rank_each(checked, results, top_n, threshold)

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]],
        *,
        timeout: float | None = None,
    ) -> list[float]:
        """Do what `score` does, off the event loop.

        An iterator is read in a thread of its own, as it is scored. An asynchronous iterator is read in the
        caller's task, likewise as it is scored.
        """
        pipeline = self._require_pipeline()
        if isinstance(pairs, AsyncIterable):
            chunks = acheck_stream(pairs, _NUM_STREAMED_PAIRS)
        elif isinstance(pairs, Iterator):
            chunks = read_in_thread(check_stream(pairs, _NUM_STREAMED_PAIRS))
        else:
            return [result.score for result in await pipeline.ascore(check_pairs(pairs), timeout=timeout)]
        stream = pipeline.ascore_stream(chunks, timeout=timeout)
        return [result.score async for results in stream for result in results]

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
        """Do what `rank` does, off the event loop."""
        check_top_n(top_n)
        check_threshold(threshold, normalize=self._normalizes(normalize))
        texts = check_passages(passages)
        check_query(query)
        results = await self._require_pipeline().ascore(
            [(query, text) for text in texts],
            timeout=timeout,
            normalize=normalize,
            find_blank=self._find_blank(query, texts),
        )
        return rank_results(results, top_n, threshold)

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do what `rank_many` does, off the event loop; an iterator is read in a thread of its own."""
        check_top_n(top_n)
        check_threshold(threshold, normalize=self._normalizes(normalize))
        if isinstance(requests, Iterator):
            checked = await run_in_thread(check_requests, requests)
        else:
            checked = check_requests(requests)
        results = await self._require_pipeline().ascore(
            _flatten(checked),
            timeout=timeout,
            normalize=normalize,
            find_blank=self._find_blank_in_each(checked),
        )
        return rank_each(checked, results, top_n, threshold)

    def warmup(self) -> None:
        """Do all that happens once, so that no user's request pays for it.

        On CUDA that includes graphs for small requests, which nothing else captures.
        """
        self._require_pipeline().warmup()
        self.score([("warm up", "short"), ("warm up", "long " * self.config.max_length)])

    async def awarmup(self) -> None:
        """Do what `warmup` does, off the event loop."""
        await asyncio.get_running_loop().run_in_executor(self._loaders, self.warmup)

    def stats(self) -> ScorerStats:
        """Return counts and times since the model was loaded."""
        return self._require_pipeline().stats()

    def health(self) -> ScorerHealth:
        """Return whether requests are taken and how many are waiting; never raises for a closed scorer."""
        pipeline = self._pipeline
        if pipeline is None:
            return ScorerHealth("closed", 0, 0, len(self.config.per_device()), 0)
        return pipeline.health()

    def close(self, timeout: float | None = None) -> None:
        """Refuse further calls, finish what was accepted and release the model. May be called twice.

        Args:
            timeout: Seconds after which what is not finished ends in `ScorerClosedError`.
        """
        with Scorer._shared_lock:
            shared = Scorer._shared.get(self.config)
            if shared is not None and shared.future.done() and shared.future.result() is self:
                del Scorer._shared[self.config]
        if self._pipeline is not None:
            self._pipeline.close(timeout)
        self._pipeline = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        devices = [] if self._pipeline is None else [str(r.device) for r in self._pipeline.runners]
        return f"Scorer(model={self.config.model!r}, {', '.join(devices) or 'closed'})"

    # A scorer is a device's resource: copies are the same scorer, and a pickle holds its settings, so
    # that another process loads its own.
    def __copy__(self) -> Scorer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Scorer:
        return self

    def __reduce__(self) -> tuple[Callable[[ScorerConfig], Scorer], tuple[ScorerConfig]]:
        return Scorer.shared, (self.config,)

    def _normalizes(self, normalize: bool | None) -> bool:
        return self._config.normalize if normalize is None else normalize

    def _find_blank(self, query: str, passages: list[str]) -> FindBlank:
        refuse = self.config.blank_passages == "refuse"
        return partial(find_blank, query=query, passages=passages, refuse=refuse)

    def _find_blank_in_each(self, requests: list[tuple[str, list[str]]]) -> FindBlank:
        refuse = self.config.blank_passages == "refuse"
        return partial(find_blank_in_each, requests=requests, refuse=refuse)

    def _require_pipeline(self) -> Pipeline:
        pipeline = self._pipeline
        if pipeline is None:
            raise ScorerClosedError("this scorer was closed; make a new one")
        return pipeline


def _flatten(requests: list[tuple[str, list[str]]]) -> list[Pair]:
    return [(query, text) for query, texts in requests for text in texts]
