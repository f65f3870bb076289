"""LlamaIndex: `BGERerankPostprocessor`, a node postprocessor that re-orders by relevance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bge_rerank_integrations.errors import missing_extra

try:
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise missing_extra("llama-index", "llama-index-core") from error

from pydantic import (
    BaseModel,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)

from bge_rerank_integrations.adapter_options import (
    MARKS,
    RerankOptions,
    independent_copy,
    marks_of,
    summarize,
)
from bge_rerank_integrations.errors import InputError, InputTypeError
from bge_rerank_integrations.ranking import RankedPassage
from bge_rerank_integrations.validation import check_query

dispatcher = get_dispatcher(__name__)


class BGERerankPostprocessor(RerankOptions, BaseNodePostprocessor):
    """Re-orders nodes by a BGE cross-encoder's relevance score and keeps the best.

    Returned are new `NodeWithScore`s with deep copies of the nodes and the score as a Python float. What
    was passed in does not change. An `IndexNode` keeps its `obj`.
    The model is loaded at first use, once per process for equal settings, shared with LangChain's
    `BGEReranker`. All options are JSON-safe fields; see `RerankOptions` and `ScorerConfig`.

    Attributes:
        metadata_mode: Which metadata is scored with a node's text; EMBED, as in LlamaIndex's own.

    Raises:
        pydantic.ValidationError: An option is unknown or cannot work.

    Example:
        >>> reranker = BGERerankPostprocessor(top_n=5)
        >>> engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[reranker])
    """

    # Not strict, since a dump holds its value as a string.
    metadata_mode: MetadataMode = Field(default=MetadataMode.EMBED, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, data: Any) -> Any:
        # The base class writes it into every dump, where it is no option.
        if isinstance(data, dict) and data.get("class_name") == cls.class_name():
            return {name: value for name, value in data.items() if name != "class_name"}
        return data

    @field_serializer("metadata_mode")
    def _serialize_mode(self, mode: MetadataMode) -> str:
        return mode.value

    @model_serializer(mode="wrap")
    def custom_model_dump(
        self,
        handler: SerializerFunctionWrapHandler,
        info: SerializationInfo,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return a dump with the class's name, as the base class does."""
        return {**self.dump_options(handler), "class_name": self.class_name()}

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes."""
        return "BGERerankPostprocessor"

    def __getstate__(self) -> dict[Any, Any]:
        # Not the base class's, which removes what does not pickle from the live object: a copy without its
        # scorer would load another model. Callbacks belong to a process and stay in it.
        state = BaseModel.__getstate__(self)
        values = {name: value for name, value in self.__dict__.items() if name != "callback_manager"}
        return {**state, "__dict__": values}

    @dispatcher.span
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        job = self._prepare(nodes, query_bundle)
        with self._events(job) as returned:
            ranked: Sequence[RankedPassage] = []
            if job.texts and self.top_n != 0:
                ranked = self.rank_texts(
                    self.resolve_scorer(), job.query.query_str, job.texts, self.top_n, self.score_threshold
                )
            returned.extend(self._scored(job, ranked))
            job.figures.update(summarize(ranked, len(job.texts)))
        return returned

    # The base class's mixin decorates the sync method only.
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        job = self._prepare(nodes, query_bundle)
        with self._events(job) as returned:
            ranked: Sequence[RankedPassage] = []
            if job.texts and self.top_n != 0:
                scorer = await self.aresolve_scorer()
                ranked = await self.arank_texts(
                    scorer, job.query.query_str, job.texts, self.top_n, self.score_threshold
                )
            returned.extend(self._scored(job, ranked))
            job.figures.update(summarize(ranked, len(job.texts)))
        return returned

    def _prepare(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> _Job:
        if query_bundle is None:
            raise InputError("Missing query bundle in extra info.")
        check_query(query_bundle.query_str)
        if isinstance(nodes, str | NodeWithScore) or not isinstance(nodes, Iterable):
            raise InputTypeError(f"nodes must be a list of NodeWithScore, not {type(nodes).__name__}")
        nodes = list(nodes)
        texts: list[str] = []
        for index, node in enumerate(nodes):
            if not isinstance(node, NodeWithScore):
                raise InputTypeError(
                    f"node {index} must be a NodeWithScore, not {type(node).__name__}", index=index
                )
            _check_node(node.node, index)
            texts.append(node.node.get_content(metadata_mode=self.metadata_mode))
        return _Job(nodes, query_bundle, texts)

    @contextmanager
    def _events(self, job: _Job) -> Iterator[list[NodeWithScore]]:
        """Emit both kinds of start and end events around the filling of the list that is yielded."""
        returned: list[NodeWithScore] = []
        top_n = len(job.nodes) if self.top_n is None else self.top_n
        model_name = self.scorer_name()
        dispatcher.event(
            ReRankStartEvent(query=job.query, nodes=job.nodes, top_n=top_n, model_name=model_name)
        )
        try:
            payload: dict[str, Any] = {
                EventPayload.NODES: job.nodes,
                EventPayload.MODEL_NAME: model_name,
                EventPayload.QUERY_STR: job.query.query_str,
                EventPayload.TOP_K: top_n,
            }
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield returned
                event.on_end(
                    payload={EventPayload.NODES: returned, EventPayload.ADDITIONAL_KWARGS: job.figures}
                )
        finally:
            dispatcher.event(ReRankEndEvent(nodes=returned))

    def _scored(self, job: _Job, ranked: Sequence[RankedPassage]) -> list[NodeWithScore]:
        return [self._copy(job.nodes[passage.index], passage) for passage in ranked]

    def _copy(self, original: NodeWithScore, passage: RankedPassage) -> NodeWithScore:
        # An IndexNode's object, such as another index, is no data of the node's.
        node = independent_copy(original.node, shared=("obj",))
        added: dict[str, Any] = {}
        if self.mark_unread:
            for key in MARKS:
                node.metadata.pop(key, None)
            added |= marks_of(passage)
        if self.keep_retrieval_score:
            added["retrieval_rank"] = passage.index
            if original.score is not None:
                added["retrieval_score"] = original.score
        if added:
            # Excluded from both texts, so that it leaks into no prompt, embedding or second reranker.
            node = node.model_copy(
                update={
                    "metadata": node.metadata | added,
                    "excluded_embed_metadata_keys": _with(node.excluded_embed_metadata_keys, added),
                    "excluded_llm_metadata_keys": _with(node.excluded_llm_metadata_keys, added),
                }
            )
        score = float(passage.score)  # a foreign scorer's may be NumPy's
        return original.model_copy(update={"node": node, "score": score})


@dataclass(frozen=True)
class _Job:
    """A validated call: `texts[i]` is the text of `nodes[i]`; `figures` are filled in when it is ranked."""

    nodes: list[NodeWithScore]
    query: QueryBundle
    texts: list[str]
    figures: dict[str, int | None] = field(default_factory=dict)


def _check_node(node: BaseNode, index: int) -> None:
    """Raise unless a node's text and metadata have the types that LlamaIndex does not check on assignment."""
    if not isinstance(node.metadata, dict):
        raise InputTypeError(
            f"the metadata of node {index} must be a dict, not {type(node.metadata).__name__}", index=index
        )
    # Without metadata it is the text as it is; in a template, None would become the word "None".
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    if not isinstance(text, str):
        raise InputTypeError(
            f"the text of node {index} must be a string, not {type(text).__name__}", index=index
        )


def _with(keys: list[str], more: dict[str, Any]) -> list[str]:
    return [*keys, *(key for key in more if key not in keys)]
