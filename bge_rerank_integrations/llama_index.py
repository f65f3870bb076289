"""LlamaIndex adapter: `BGERerankPostprocessor`, a node postprocessor that sorts nodes by relevance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bge_rerank_integrations.errors import missing_extra

try:
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
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
    field_validator,
    model_serializer,
    model_validator,
)

from bge_rerank_integrations.adapters.calls import arank_texts, rank_texts
from bge_rerank_integrations.adapters.copies import independent_copy, yielding_now_and_then
from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.adapters.results import (
    MARKS,
    RETRIEVAL_KEYS,
    as_score,
    summarize,
    type_of,
)
from bge_rerank_integrations.errors import ConfigError, InputError, InputTypeError
from bge_rerank_integrations.ranking import RankedPassage
from bge_rerank_integrations.validation import check_query

dispatcher = get_dispatcher(__name__)


class BGERerankPostprocessor(RerankOptions, BaseNodePostprocessor):
    """Sorts nodes by the relevance scores of a BGE cross-encoder and keeps the best `top_n`.

    `postprocess_nodes` returns new `NodeWithScore` objects with deep copies of the nodes and the score as a
    Python float. The nodes that were passed in do not change. The copy of an `IndexNode` shares its `obj`
    with the original.

    The model is loaded at first use. Adapters with equal settings share one model per process, including the
    LangChain adapter `BGEReranker`. `RerankOptions` and `ScorerConfig` describe the other options. All
    options except `scorer` are JSON-serializable.

    Attributes:
        metadata_mode: Which metadata to score together with the text of a node. The default is
            `MetadataMode.EMBED`, the metadata that embedding models see, as in the rerankers of LlamaIndex.

    Raises:
        pydantic.ValidationError: An option is unknown or invalid.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> reranker = BGERerankPostprocessor(model="embedded", top_n=1)
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("hi", "The panda is a bear.")]
        >>> reranker.postprocess_nodes(nodes, query_str="what is a panda?")[0].text
        'The panda is a bear.'
    """

    # Not strict, because a dump contains its value as a string.
    metadata_mode: MetadataMode = Field(default=MetadataMode.EMBED, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, data: Any) -> Any:
        # The base class adds `class_name` to every dump, but it is not an option.
        if isinstance(data, dict) and data.get("class_name") == cls.class_name():
            return {name: value for name, value in data.items() if name != "class_name"}
        return data

    @field_validator("callback_manager")
    @classmethod
    def _check_callback_manager(cls, manager: Any) -> CallbackManager:
        if not isinstance(manager, CallbackManager):
            raise ConfigError(f"callback_manager must be a CallbackManager, not {type_of(manager)}")
        return manager

    @field_serializer("metadata_mode")
    def _serialize_mode(self, mode: MetadataMode) -> str:
        return mode.value

    @model_serializer(mode="wrap")
    def custom_model_dump(
        self,
        handler: SerializerFunctionWrapHandler,
        info: SerializationInfo,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return a dump of the options with the name of the class, like the base class."""
        return {**self.dump_options(handler), "class_name": self.class_name()}

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serializes this class."""
        return "BGERerankPostprocessor"

    def __getstate__(self) -> dict[Any, Any]:
        # The base class removes values that cannot be pickled from this object itself. Without its scorer, it
        # would load another model. Callbacks belong to this process and are not pickled.
        state = BaseModel.__getstate__(self)
        values = {name: value for name, value in self.__dict__.items() if name != "callback_manager"}
        return {**state, "__dict__": values}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # The base class calls `__init__`, which a subclass may have replaced.
        BaseModel.__setstate__(self, state)
        if "callback_manager" not in self.__dict__:
            field = type(self).model_fields["callback_manager"]
            self.__dict__["callback_manager"] = field.get_default(call_default_factory=True)

    @dispatcher.span
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        call = self._prepare(nodes, query_bundle)
        with self._events(call) as returned:
            ranked = rank_texts(self, call.query.query_str, call.texts, self.top_n, self.score_threshold)
            returned += [self._copy(call.nodes[passage.index], passage) for passage in ranked]
            call.figures.update(summarize(ranked, len(call.texts)))
        return returned

    # The base class adds a span to the sync method only.
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        call = self._prepare(nodes, query_bundle)
        with self._events(call) as returned:
            ranked = await arank_texts(
                self, call.query.query_str, call.texts, self.top_n, self.score_threshold
            )
            passages = yielding_now_and_then(ranked)
            returned += [self._copy(call.nodes[passage.index], passage) async for passage in passages]
            call.figures.update(summarize(ranked, len(call.texts)))
        return returned

    def _prepare(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> _Call:
        if query_bundle is None:
            raise InputError("Missing query bundle in extra info.")
        if not isinstance(query_bundle, QueryBundle):
            kind = type_of(query_bundle)
            raise InputTypeError(
                f"query_bundle must be a QueryBundle, not {kind}; pass a string as query_str="
            )
        check_query(query_bundle.query_str)
        if isinstance(nodes, str | NodeWithScore) or not isinstance(nodes, Iterable):
            raise InputTypeError(f"nodes must be a list of NodeWithScore, not {type(nodes).__name__}")
        nodes = list(nodes)
        texts: list[str] = []
        for index, node in enumerate(nodes):
            if not isinstance(node, NodeWithScore):
                raise InputTypeError(
                    f"node {index} must be a NodeWithScore, not {type_of(node)}", index=index
                )
            _check_node(node.node, index)
            try:
                text = _without_own_keys(node.node).get_content(metadata_mode=self.metadata_mode)
            except Exception:  # of a template or of a value's class; the message may contain the value
                raise InputError(
                    f"the text of node {index} cannot be made from its templates and metadata", index=index
                ) from None
            texts.append(text)
        return _Call(nodes, query_bundle, texts)

    @contextmanager
    def _events(self, call: _Call) -> Iterator[list[NodeWithScore]]:
        """Emit start and end events of both kinds around the block. The block fills the yielded list."""
        returned: list[NodeWithScore] = []
        top_n = len(call.nodes) if self.top_n is None else self.top_n
        model_name = self.scorer_name()
        dispatcher.event(
            ReRankStartEvent(query=call.query, nodes=call.nodes, top_n=top_n, model_name=model_name)
        )
        try:
            payload: dict[str, Any] = {
                EventPayload.NODES: call.nodes,
                EventPayload.MODEL_NAME: model_name,
                EventPayload.QUERY_STR: call.query.query_str,
                EventPayload.TOP_K: top_n,
            }
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield returned
                event.on_end(
                    payload={EventPayload.NODES: returned, EventPayload.ADDITIONAL_KWARGS: call.figures}
                )
        finally:
            dispatcher.event(ReRankEndEvent(nodes=returned))

    def _copy(self, original: NodeWithScore, passage: RankedPassage) -> NodeWithScore:
        # The object of an IndexNode, such as another index, is not part of the node's data.
        node = independent_copy(original.node, shared=("obj",))
        added = self.added_metadata(node.metadata, passage, as_score(original.score))
        if added:
            # Excluded from both texts, so that no prompt and no embedding contains these keys.
            node = node.model_copy(
                update={
                    "metadata": node.metadata | added,
                    "excluded_embed_metadata_keys": _with(node.excluded_embed_metadata_keys, added),
                    "excluded_llm_metadata_keys": _with(node.excluded_llm_metadata_keys, added),
                }
            )
        score = float(passage.score)  # a scorer of the user may return a NumPy float
        copied = independent_copy(original, shared=("node",))
        return copied.model_copy(update={"node": node, "score": score})


@dataclass(frozen=True)
class _Call:
    """A validated call. `texts[i]` is the text of `nodes[i]`. `figures` is filled in after ranking."""

    nodes: list[NodeWithScore]
    query: QueryBundle
    texts: list[str]
    figures: dict[str, int | None] = field(default_factory=dict)


def _check_node(node: BaseNode, index: int) -> None:
    """Raise unless a node's text and metadata have the right types. LlamaIndex does not check assignments."""
    if not isinstance(node.metadata, dict):
        raise InputTypeError(
            f"the metadata of node {index} must be a dict, not {type(node.metadata).__name__}", index=index
        )
    # MetadataMode.NONE returns the unchanged text. A template would turn None into the word "None".
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    if not isinstance(text, str):
        raise InputTypeError(
            f"the text of node {index} must be a string, not {type(text).__name__}", index=index
        )


def _without_own_keys(node: BaseNode) -> BaseNode:
    """Return a node without the keys that an earlier call of an adapter added. They are not part of its text.

    `MetadataMode.ALL` would show them, since it ignores that they are excluded.
    """
    excluded = node.excluded_embed_metadata_keys
    own = [key for key in (*MARKS, *RETRIEVAL_KEYS) if key in node.metadata and key in excluded]
    if not own:
        return node
    metadata = {key: value for key, value in node.metadata.items() if key not in own}
    return node.model_copy(update={"metadata": metadata})


def _with(keys: list[str], more: dict[str, Any]) -> list[str]:
    return [*keys, *(key for key in more if key not in keys)]
