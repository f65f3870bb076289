"""`Scorer`: relevance scores and rankings from one loaded cross-encoder, sync and async."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

from bge_rerank_integrations.config import DEFAULT_MODEL, DType, LongPassages, ScorerConfig
from bge_rerank_integrations.errors import (
    ConfigError,
    NonFiniteScoreError,
    ScorerClosedError,
    UnsupportedCheckpointError,
)
from bge_rerank_integrations.inputs import (
    check_pairs,
    check_passages,
    check_query,
    check_requests,
    is_single_pair,
)
from bge_rerank_integrations.ranking import (
    RankedPassage,
    Ranking,
    check_threshold,
    check_top_n,
    select,
    sigmoid,
)
from bge_rerank_integrations.tokenization import IntArray, PairTokenizer

if TYPE_CHECKING:
    from bge_rerank_integrations.engine.runner import Runner

T = TypeVar("T")

# The device runs one batch at a time; more threads than this would only tokenize ahead of it.
_NUM_WORKERS = 4


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
        """Rank passages, best first; see `Scorer.rank`."""

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> Sequence[RankedPassage]:
        """Rank passages without blocking the event loop; see `Scorer.arank`."""


class Scorer:
    """Scores (query, passage) pairs with a BGE reranker or another one-label XLM-RoBERTa cross-encoder.

    One scorer holds one model on one device. Any number of threads and tasks may use it at once, and
    each gets what it would get alone. Settings are those of `ScorerConfig`, where each is explained.

    Attributes:
        config: The settings, immutable.

    Raises:
        ConfigError: A setting cannot work, alone or with this model.
        CheckpointError: The model cannot be found or used; the message says what to do.
        DeviceError: The device is not available.

    Example:
        >>> with Scorer("BAAI/bge-reranker-base") as scorer:
        ...     scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], top_n=1)
        [RankedPassage(index=1, score=..., truncated=False, windows=1)]
    """

    _shared: ClassVar[dict[ScorerConfig, Future[Scorer]]] = {}
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()
    # Models load here for callers that must not block; the loop's default pool is others' business.
    _loaders: ClassVar[ThreadPoolExecutor] = ThreadPoolExecutor(2, "bge-rerank-load")

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        device: str = "auto",
        dtype: DType = "auto",
        max_length: int = 512,
        query_max_length: int | None = None,
        max_batch_tokens: int | None = None,
        normalize: bool = False,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        long_passages: LongPassages = "truncate",
        window_overlap_tokens: int = 64,
    ) -> None:
        self.config = ScorerConfig(
            model=os.fspath(model) if isinstance(model, os.PathLike) else model,
            revision=revision,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            device=device,
            dtype=dtype,
            max_length=max_length,
            query_max_length=query_max_length,
            max_batch_tokens=max_batch_tokens,
            normalize=normalize,
            query_instruction=query_instruction,
            passage_instruction=passage_instruction,
            long_passages=long_passages,
            window_overlap_tokens=window_overlap_tokens,
        )
        self._engine: tuple[PairTokenizer, Runner] | None = _load(self.config)
        self._executor = ThreadPoolExecutor(_NUM_WORKERS, "bge-rerank")

    @classmethod
    def from_config(cls, config: ScorerConfig) -> Scorer:
        """Load a scorer of one's own with the settings of a config."""
        return cls(**config.to_dict())  # type: ignore[arg-type]

    @classmethod
    def shared(cls, config: ScorerConfig) -> Scorer:
        """Return the process's one scorer with these settings, loading it if nobody has.

        However many threads ask at once, the model is loaded once, and if that fails each of them gets
        the error. The scorer lives until somebody calls its `close()`.
        """
        with cls._shared_lock:
            future = cls._shared.get(config)
            is_first = future is None
            if future is None:
                future = cls._shared[config] = Future()
        if is_first:
            try:
                future.set_result(cls.from_config(config))
            except BaseException as error:
                with cls._shared_lock:
                    cls._shared.pop(config, None)
                future.set_exception(error)
        return future.result()

    @classmethod
    async def ashared(cls, config: ScorerConfig) -> Scorer:
        """Return what `shared` returns; a model that is not loaded yet is loaded off the event loop."""
        future = cls._shared.get(config)
        if future is not None and future.done():
            return future.result()
        return await asyncio.get_running_loop().run_in_executor(cls._loaders, cls.shared, config)

    def score(self, pairs: Iterable[tuple[str, str]], *, progress: bool = False) -> list[float]:
        """Score pairs.

        Args:
            pairs: (query, passage) pairs.
            progress: Show a progress bar on stderr.

        Returns:
            One float a pair, in order: the raw logit, or 0..1 if the config normalizes.

        Raises:
            InputTypeError: A pair is not two strings; `.index` says which.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` says for which pair.
            ScorerClosedError: The scorer was closed.
        """
        queries, passages = check_pairs(pairs)
        return [result.score for result in self._score(queries, passages, progress=progress)]

    def compute_score(
        self,
        sentence_pairs: tuple[str, str] | Iterable[tuple[str, str]],
        *,
        normalize: bool | None = None,
        progress: bool = False,
    ) -> list[float]:
        """Score one pair or a list of pairs, as `FlagReranker.compute_score` does; always a list.

        Args:
            sentence_pairs: One (query, passage) pair, or pairs.
            normalize: Put scores through a sigmoid or not; None is as configured.
            progress: Show a progress bar on stderr.

        Raises:
            InputTypeError, NonFiniteScoreError, ScorerClosedError: As `score` does.
        """
        pairs = [sentence_pairs] if is_single_pair(sentence_pairs) else sentence_pairs
        queries, passages = check_pairs(pairs)
        results = self._score(queries, passages, progress=progress, normalize=normalize)
        return [result.score for result in results]

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        progress: bool = False,
    ) -> Ranking:
        """Rank passages by their relevance to a query.

        Args:
            query: The query.
            passages: Texts to rank.
            top_n: Most passages to return; None is all, 0 is none.
            threshold: Least score to return, inclusive; None returns every score.
            progress: Show a progress bar on stderr.

        Returns:
            A list of `RankedPassage`, best first, equal scores in input order.

        Raises:
            InputError: An argument is of the wrong type or out of range; `.index` says which passage.
            NonFiniteScoreError: The model returned NaN or infinity; `.index` says for which passage.
            ScorerClosedError: The scorer was closed.
        """
        check_top_n(top_n)
        check_threshold(threshold)
        texts = check_passages(passages)
        queries = [check_query(query)] * len(texts)
        return _rank(self._score(queries, texts, progress=progress), top_n, threshold)

    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        progress: bool = False,
    ) -> list[Ranking]:
        """Rank the passages of several queries in one pass, which fills batches better than many calls.

        Args:
            requests: (query, passages) of each request.
            top_n: As in `rank`, for each request.
            threshold: As in `rank`, for each request.
            progress: Show a progress bar on stderr.

        Returns:
            One ranking a request, in order.

        Raises:
            InputError, ScorerClosedError: As `rank` does; `.index` says which request.
            NonFiniteScoreError: As `rank` does; `.index` counts passages through all requests.
        """
        check_top_n(top_n)
        check_threshold(threshold)
        checked = check_requests(requests)
        queries = [query for query, texts in checked for _ in texts]
        passages = [text for _, texts in checked for text in texts]
        results = iter(self._score(queries, passages, progress=progress))
        return [_rank([next(results) for _ in texts], top_n, threshold) for _, texts in checked]

    async def ascore(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Do what `score` does, off the event loop."""
        return await self._run(partial(self.score, pairs))

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> Ranking:
        """Do what `rank` does, off the event loop."""
        return await self._run(partial(self.rank, query, passages, top_n, threshold))

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> list[Ranking]:
        """Do what `rank_many` does, off the event loop."""
        return await self._run(partial(self.rank_many, requests, top_n, threshold))

    def warmup(self) -> None:
        """Score a short and a full-length pair, so that no user's request pays for what happens once."""
        self.score([("warm up", "short"), ("warm up", "long " * self.config.max_length)])

    def close(self) -> None:
        """Finish what was accepted, release the model and refuse further calls. May be called twice."""
        with Scorer._shared_lock:
            future = Scorer._shared.get(self.config)
            if future is not None and future.done() and future.result() is self:
                del Scorer._shared[self.config]
        self._executor.shutdown(wait=True)
        self._engine = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else str(self._engine[1].device)
        return f"Scorer(model={self.config.model!r}, {state})"

    # A scorer is a device's resource: copies are the same scorer, and a pickle holds its settings, so
    # that another process loads its own.
    def __copy__(self) -> Scorer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Scorer:
        return self

    def __reduce__(self) -> tuple[Callable[[ScorerConfig], Scorer], tuple[ScorerConfig]]:
        return Scorer.shared, (self.config,)

    async def _run(self, call: Callable[[], T]) -> T:
        self._require_engine()
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _require_engine(self) -> tuple[PairTokenizer, Runner]:
        engine = self._engine
        if engine is None:
            raise ScorerClosedError("this scorer was closed; make a new one")
        return engine

    def _score(
        self,
        queries: list[str],
        passages: list[str],
        *,
        progress: bool = False,
        normalize: bool | None = None,
    ) -> list[_PairResult]:
        """Score `zip(queries, passages)`, each distinct pair once."""
        tokenizer, runner = self._require_engine()
        pairs = list(zip(queries, passages, strict=True))
        if not pairs:
            return []
        distinct = list(dict.fromkeys(pairs))
        encoded = tokenizer.encode([query for query, _ in distinct], [text for _, text in distinct])
        windows = [window for pair in encoded for window in pair.windows]
        logits = iter(_run_with_progress(runner, windows, progress=progress))
        if normalize is None:
            normalize = self.config.normalize
        results = {}
        for pair, encoded_pair in zip(distinct, encoded, strict=True):
            window_logits = [next(logits) for _ in encoded_pair.windows]
            if not all(map(math.isfinite, window_logits)):
                index = pairs.index(pair)
                raise NonFiniteScoreError(f"the model's score of pair {index} is not finite", index=index)
            best = max(window_logits)
            results[pair] = _PairResult(
                score=sigmoid(best) if normalize else best,
                truncated=encoded_pair.truncated,
                windows=len(window_logits),
                num_tokens=sum(map(len, encoded_pair.windows)),
            )
        return [results[pair] for pair in pairs]


class _PairResult(NamedTuple):
    score: float
    truncated: bool
    windows: int
    num_tokens: int


def _rank(results: list[_PairResult], top_n: int | None, threshold: float | None) -> Ranking:
    ranked = [
        RankedPassage(index, result.score, result.truncated, result.windows)
        for index, result in enumerate(results)
    ]
    return Ranking(
        select(ranked, top_n, threshold),
        num_pairs=len(results),
        num_tokens=sum(result.num_tokens for result in results),
        num_truncated=sum(result.truncated for result in results),
    )


def _run_with_progress(runner: Runner, windows: list[IntArray], *, progress: bool) -> list[float]:
    if not progress:
        return runner.run(windows)
    from tqdm.auto import tqdm

    with tqdm(total=len(windows), desc="scoring", unit="pair") as bar:
        return runner.run(windows, on_progress=bar.update)


def _load(config: ScorerConfig) -> tuple[PairTokenizer, Runner]:
    # Here and not above, so that naming a scorer in a signature does not cost the import of torch.
    from bge_rerank_integrations.engine.checkpoint import find_checkpoint, read_shape, require_file
    from bge_rerank_integrations.engine.runner import load_runner

    folder = find_checkpoint(config)
    shape = read_shape(folder)
    if config.max_length > shape.max_length:
        raise ConfigError(
            f"max_length {config.max_length} is more than the {shape.max_length} tokens that "
            f"{config.model!r} has positions for"
        )
    tokenizer = PairTokenizer(require_file(folder, "tokenizer.json"), config)
    if tokenizer.max_id >= shape.vocab_size:
        raise UnsupportedCheckpointError(
            f"{folder}: the tokenizer gives ids up to {tokenizer.max_id}, but the model embeds only "
            f"{shape.vocab_size}; tokenizer.json and weights must be of one checkpoint"
        )
    return tokenizer, load_runner(config, folder, shape)
