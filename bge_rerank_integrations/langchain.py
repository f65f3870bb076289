"""LangChain adapter: `BGEReranker`, a document compressor that sorts documents by relevance."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from types import EllipsisType
from typing import Any

from bge_rerank_integrations.errors import missing_extra

try:
    from langchain_core.callbacks import AsyncCallbackManager, CallbackManager, Callbacks
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables.config import ensure_config
except ImportError as error:
    raise missing_extra("langchain", "langchain-core") from error

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from typing_extensions import Self

from bge_rerank_integrations.adapters.calls import arank_requests, arank_texts, rank_requests, rank_texts
from bge_rerank_integrations.adapters.copies import independent_copy, yielding_now_and_then
from bge_rerank_integrations.adapters.cross_encoder import CrossEncoderView
from bge_rerank_integrations.adapters.document_texts import TextSource, check_fields, check_template, texts_of
from bge_rerank_integrations.adapters.options import Names, RerankOptions
from bge_rerank_integrations.adapters.results import (
    MARKS,
    RETRIEVAL_KEYS,
    as_score,
    summarize,
    summarize_all,
    type_of,
)
from bge_rerank_integrations.errors import ConfigError, InputTypeError
from bge_rerank_integrations.ranking import RankedPassage, check_top_n
from bge_rerank_integrations.runtime.reader_threads import run_in_thread
from bge_rerank_integrations.validation import check_query, check_requests


class BGEReranker(RerankOptions, BaseDocumentCompressor):
    r"""Sorts documents by the relevance scores of a BGE cross-encoder and keeps the best `top_n`.

    The returned documents are deep copies with the same id and metadata. Their metadata contains the score as
    a Python float. Values that cannot be copied, such as a lock, are shared with the original documents.

    The model is loaded at first use. Adapters with equal settings share one model per process, including the
    LlamaIndex adapter `BGERerankPostprocessor`. `RerankOptions` and `ScorerConfig` describe the other
    options.

    Attributes:
        score_key: Metadata key of the score.
        rank_fields: Metadata fields to score together with the text. Each field becomes a line `name: value`
            before the text. A field that is missing, None or NaN has no line.
        document_template: Format string of the text to score, with `page_content` and metadata fields as
            placeholders, such as `"{title}\n{page_content}"`. A field that is None or NaN becomes an empty
            string. It cannot be combined with `rank_fields`.

    Raises:
        pydantic.ValidationError: An option is unknown or invalid.

    Example:
        >>> from langchain_core.documents import Document
        >>> reranker = BGEReranker(model="embedded", top_n=1)
        >>> documents = [Document("hi"), Document("The giant panda is a bear.")]
        >>> reranker.compress_documents(documents, "what is a panda?")[0].page_content
        'The giant panda is a bear.'
    """

    score_key: str = Field(default="relevance_score", min_length=1)
    rank_fields: Names | None = None
    document_template: str | None = None

    @field_validator("document_template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            check_template(template)
        return template

    @model_validator(mode="after")
    def _check_score_key(self) -> Self:
        if self.keep_retrieval_score and self.score_key in RETRIEVAL_KEYS:
            raise ConfigError(f"score_key {self.score_key!r} is a key that keep_retrieval_score sets")
        if self.mark_unread and self.score_key in MARKS:
            raise ConfigError(f"score_key {self.score_key!r} is a key that mark_unread sets")
        return self

    @model_validator(mode="after")
    def _check_one_text_option(self) -> Self:
        if self.rank_fields is not None and self.document_template is not None:
            raise ConfigError("rank_fields and document_template cannot both be set")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return self.dump_options(handler)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents, best first.

        Args:
            documents: Retrieved documents. They are not changed.
            query: The query that the documents are ranked for.
            callbacks: Callbacks that receive a run with the name of the model and the numbers of pairs,
                tokens and truncated documents.

        Returns:
            Copies of at most `top_n` documents whose score reaches `score_threshold`.

        Raises:
            InputError: The query or a document cannot be scored; `.index` says which document.
            RequestTimeoutError: The call did not finish within `timeout`.
            CheckpointError: The model cannot be used.

        Example:
            >>> best = reranker.compress_documents([Document("hi"), Document("A bear.")], "what is a panda?")
        """
        documents = _check_documents(documents)
        texts = self._texts(documents, self.rank_fields)
        ranked = self._rank(check_query(query), texts, self.top_n, callbacks)
        return [self._scored_copy(documents[passage.index], passage) for passage in ranked]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Do the same as `compress_documents` without blocking the event loop, even to load the model."""
        documents = _check_documents(documents)
        texts = self._texts(documents, self.rank_fields)
        ranked = await self._arank(check_query(query), texts, self.top_n, callbacks)
        passages = yielding_now_and_then(ranked)
        return [self._scored_copy(documents[passage.index], passage) async for passage in passages]

    def rerank(
        self,
        documents: Sequence[TextSource],
        query: str,
        *,
        rank_fields: Sequence[str] | None = None,
        top_n: int | EllipsisType | None = ...,
    ) -> list[dict[str, Any]]:
        """Rank strings, mappings or documents, and return their indices and scores.

        Args:
            documents: Strings, mappings or `Document`s. A mapping is scored as lines `name: value`.
            query: The query that the documents are ranked for.
            rank_fields: Fields of mappings and documents to score. None uses the option of this reranker. If
                that is None too, all fields of a mapping are scored.
            top_n: Maximum number of results. None returns all. `...`, the default, uses the option of this
                reranker.

        Returns:
            One dict for each result, best first. `"index"` is the position in `documents`, and
            `"relevance_score"` is a float. A blank document comes last, and its dict also contains
            `"blank": True`.

        Raises:
            InputError: The query or a document cannot be scored; `.index` says which document.

        Example:
            >>> reranker.rerank(["hi", "The giant panda is a bear."], "what is a panda?", top_n=1)
            [{'index': 1, 'relevance_score': ...}]
        """
        texts = self._texts(documents, self._fields(rank_fields))
        return _as_dicts(self._rank(check_query(query), texts, self._top_n(top_n), None))

    async def arerank(
        self,
        documents: Sequence[TextSource],
        query: str,
        *,
        rank_fields: Sequence[str] | None = None,
        top_n: int | EllipsisType | None = ...,
    ) -> list[dict[str, Any]]:
        """Do the same as `rerank` without blocking the event loop."""
        texts = self._texts(documents, self._fields(rank_fields))
        return _as_dicts(await self._arank(check_query(query), texts, self._top_n(top_n), None))

    def rerank_many(
        self,
        requests: Sequence[tuple[str, Sequence[TextSource]]],
        *,
        rank_fields: Sequence[str] | None = None,
        top_n: int | EllipsisType | None = ...,
    ) -> list[list[dict[str, Any]]]:
        """Rank the documents of several queries. A `Scorer` does it in one call, which fills batches better.

        Args:
            requests: (query, documents) of each request.
            rank_fields: As in `rerank`.
            top_n: As in `rerank`, for each request.

        Returns:
            The result of `rerank` for each request, in order.

        Raises:
            InputError: For the same reasons as `rerank`; `.index` says which request.

        Example:
            >>> results = reranker.rerank_many([("panda", ["a bear", "tea"]), ("tea", ["a cup of tea"])])
        """
        prepared = self._requests(requests, rank_fields)
        limit = self._top_n(top_n)
        num_pairs = sum(len(texts) for _, texts in prepared)
        with self._run(None, num_pairs) as outputs:
            rankings = rank_requests(self, prepared, limit, self.score_threshold)
            outputs |= summarize_all(rankings, [len(texts) for _, texts in prepared])
        return [_as_dicts(ranked) for ranked in rankings]

    async def arerank_many(
        self,
        requests: Sequence[tuple[str, Sequence[TextSource]]],
        *,
        rank_fields: Sequence[str] | None = None,
        top_n: int | EllipsisType | None = ...,
    ) -> list[list[dict[str, Any]]]:
        """Do the same as `rerank_many` without blocking the event loop."""
        prepared = self._requests(requests, rank_fields)
        limit = self._top_n(top_n)
        num_pairs = sum(len(texts) for _, texts in prepared)
        async with self._arun(None, num_pairs) as outputs:
            rankings = await arank_requests(self, prepared, limit, self.score_threshold)
            outputs |= summarize_all(rankings, [len(texts) for _, texts in prepared])
        return [_as_dicts(ranked) for ranked in rankings]

    def warmup(self) -> None:
        """Load the model and do all other one-time work; see `RerankOptions.warmup`."""
        super().warmup()
        _import_tracing()

    async def awarmup(self) -> None:
        """Do the same as `warmup` without blocking the event loop."""
        await super().awarmup()
        await run_in_thread(_import_tracing)

    def as_cross_encoder(self) -> BaseCrossEncoder:
        """Return a `BaseCrossEncoder` with the scores of this reranker, for code that expects that interface.

        The scores are normalized if this reranker normalizes. `top_n` and `score_threshold` do not apply. A
        blank passage gets the lowest value of the scale, 0.0 or -65504.0, and is therefore
        sorted last. A blank query raises `InputError`.

        Example:
            >>> reranker.as_cross_encoder().score([("what is a panda?", "The giant panda is a bear.")])
            [...]
        """
        return CrossEncoderView(self)

    def _rank(
        self, query: str, texts: list[str], top_n: int | None, callbacks: Callbacks | None
    ) -> Sequence[RankedPassage]:
        with self._run(callbacks, len(texts)) as outputs:
            ranked = rank_texts(self, query, texts, top_n, self.score_threshold)
            outputs |= summarize(ranked, len(texts))
        return ranked

    async def _arank(
        self, query: str, texts: list[str], top_n: int | None, callbacks: Callbacks | None
    ) -> Sequence[RankedPassage]:
        async with self._arun(callbacks, len(texts)) as outputs:
            ranked = await arank_texts(self, query, texts, top_n, self.score_threshold)
            outputs |= summarize(ranked, len(texts))
        return ranked

    def _requests(
        self, requests: Sequence[tuple[str, Sequence[TextSource]]], rank_fields: Sequence[str] | None
    ) -> list[tuple[str, list[str]]]:
        fields = self._fields(rank_fields)
        return check_requests(requests, lambda documents: self._texts(documents, fields))

    @contextmanager
    def _run(self, callbacks: Callbacks | None, num_pairs: int) -> Iterator[dict[str, Any]]:
        """Trace the block as a run. The entries of the yielded dict become the outputs of the run."""
        manager = CallbackManager.configure(_inherited(callbacks))
        run = manager.on_chain_start(None, self._run_inputs(num_pairs), name=type(self).__name__)
        outputs: dict[str, Any] = {"model": self.scorer_name()}
        try:
            yield outputs
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(outputs)

    @asynccontextmanager
    async def _arun(self, callbacks: Callbacks | None, num_pairs: int) -> AsyncIterator[dict[str, Any]]:
        if not _import_tracing.cache_info().currsize:
            await run_in_thread(_import_tracing)
        manager = AsyncCallbackManager.configure(_inherited(callbacks))
        run = await manager.on_chain_start(None, self._run_inputs(num_pairs), name=type(self).__name__)
        outputs: dict[str, Any] = {"model": self.scorer_name()}
        try:
            yield outputs
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(outputs)

    def _run_inputs(self, num_pairs: int) -> dict[str, Any]:
        return {"model": self.scorer_name(), "num_pairs": num_pairs}

    def _fields(self, rank_fields: Iterable[str] | None) -> tuple[str, ...] | None:
        names = self.rank_fields if rank_fields is None else rank_fields
        return None if names is None else check_fields(names)

    def _top_n(self, top_n: int | EllipsisType | None) -> int | None:
        if isinstance(top_n, EllipsisType):
            return self.top_n
        check_top_n(top_n)
        return top_n

    def _scored_copy(self, document: Document, passage: RankedPassage) -> Document:
        copied = independent_copy(document)
        metadata = copied.metadata
        # The keys that retrievers and other rerankers use.
        scores = [as_score(metadata.get(key)) for key in (self.score_key, "score")]
        found = next((score for score in scores if score is not None), None)
        metadata |= self.added_metadata(metadata, passage, found)
        metadata[self.score_key] = float(passage.score)  # a scorer of the user may return a NumPy float
        return copied

    def _texts(self, documents: Sequence[TextSource], rank_fields: Sequence[str] | None) -> list[str]:
        return texts_of(documents, rank_fields, self.document_template if rank_fields is None else None)


@cache
def _import_tracing() -> None:
    """Import what LangChain imports when a run begins for the first time. This takes about 0.2 s."""
    CallbackManager.configure()


def _inherited(callbacks: Callbacks | None) -> Callbacks:
    # Without callbacks of its own, a call inside a chain is traced under that chain, like any runnable.
    return ensure_config().get("callbacks") if callbacks is None else callbacks


def _check_documents(documents: Sequence[Document]) -> list[Document]:
    if isinstance(documents, str | Document | Mapping) or not isinstance(documents, Iterable):
        raise InputTypeError(f"documents must be a sequence of Documents, not {type(documents).__name__}")
    checked = list(documents)
    for index, document in enumerate(checked):
        if not isinstance(document, Document):
            raise InputTypeError(f"document {index} must be a Document, not {type_of(document)}", index=index)
    return checked


def _as_dicts(ranked: Sequence[RankedPassage]) -> list[dict[str, Any]]:
    return [
        {"index": operator.index(passage.index), "relevance_score": float(passage.score)}
        | ({"blank": True} if getattr(passage, "blank", False) else {})
        for passage in ranked
    ]
