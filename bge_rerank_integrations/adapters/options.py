"""The options that both framework adapters share, with the same names, order and defaults."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import Self

from bge_rerank_integrations.adapters.missing_scorer import MissingScorer, missing_scorer_dump, read_scorer
from bge_rerank_integrations.adapters.results import (
    MARKS,
    RETRIEVAL_RANK_KEY,
    RETRIEVAL_SCORE_KEY,
    marks_of,
)
from bge_rerank_integrations.config import (
    DEFAULT_MODEL,
    DEFAULT_WINDOW_OVERLAP,
    BlankPassages,
    DType,
    LongPassages,
    ScorerConfig,
    TruncationSide,
    path_to_str,
)
from bge_rerank_integrations.errors import ConfigError, InputError
from bge_rerank_integrations.protocols import PackageScorer, SupportsRank
from bge_rerank_integrations.ranking import RankedPassage, check_threshold
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.validation import MAX_TIMEOUT_S

Options = TypeVar("Options", bound="RerankOptions")

_SCORER_FIELDS = tuple(field.name for field in dataclasses.fields(ScorerConfig))

# Pydantic treats it as a string. An error then names the option once, and the schema shows the dumped type.
PathOrName = Annotated[
    str | os.PathLike[str],
    GetPydanticSchema(lambda _, handler: handler(str)),
    BeforeValidator(path_to_str),
]
# Stored as a tuple and dumped as a list, which is what JSON has. A dump then equals the dump of its reloaded
# copy.
Names = Annotated[Sequence[str], AfterValidator(tuple), PlainSerializer(list, return_type=list[str])]


class RerankOptions(BaseModel):
    """The options of an adapter. `ScorerConfig` describes those from `model` to `blank_passages`.

    Attributes:
        top_n: Maximum number of documents to return. None returns all, 0 returns none.
        score_threshold: Minimum score to return, inclusive. It is on the same scale as the scores: above 0
            and at most 1 with `normalize=True`, any finite number with `normalize=False`. None returns every
            document.
        normalize: Apply a sigmoid, so that scores lie between 0 and 1. This is the default here, because it
            is the scale that frameworks expect. False returns raw logits, which are the default of `Scorer`.
        keep_retrieval_score: Keep the retriever's result in the metadata of the returned documents:
            `retrieval_score`, a float, if the retriever gave one, and `retrieval_rank`, counted from 0.
        mark_unread: Mark documents that the model did not read completely. The marks are keys in the
            metadata. `rerank_truncated` is True if the end of the document did not fit into the model.
            `rerank_blank` is True if the document is blank and was not scored. Other documents get neither
            key. LlamaIndex shows these keys neither to an LLM nor to an embedding model.
        timeout: Maximum duration of a call in seconds, not including the time to load the model. None means
            no limit. When the timeout expires, the call raises `RequestTimeoutError`, and sequences that have
            not started are dropped. Call `warmup` to load the model in advance.
        scorer: A scorer of your own: a `Scorer`, a `RemoteScorer`, a `ServeScorer`, or an object with the
            methods `rank` and `arank` of `SupportsRank`. None, the default, uses the scorer that the process
            shares for these settings, and loads it at first use. A scorer of your own has its own settings,
            so the options from `model` to `blank_passages` cannot be combined with it. `normalize` and
            `timeout` apply to a scorer of this package. `normalize` has no effect on another object, and
            `timeout` cannot be combined with it. A dump of the adapter does not contain the scorer, because
            it may hold an address or a key. An adapter that is loaded from such a dump raises `ConfigError`
            until `scorer` is set again.

    Example:
        >>> BGEReranker(model="embedded", top_n=3).scorer_config().model
        'embedded'
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
    )

    model: PathOrName = DEFAULT_MODEL
    revision: str | None = None
    sha256: str | None = None
    cache_folder: PathOrName | None = None
    local_files_only: bool = False
    device: str = "auto"
    devices: Names | None = None
    dtype: DType = "auto"
    max_length: int = 512
    query_max_length: int | None = None
    query_truncation_side: TruncationSide = "right"
    max_batch_tokens: int | None = None
    num_threads: int | None = None
    capture_graphs: bool = True
    max_wait_ms: float = 0.0
    max_queued_tokens: int | None = None
    query_instruction: str | None = None
    passage_instruction: str | None = None
    long_passages: LongPassages = "truncate"
    window_overlap_tokens: int = DEFAULT_WINDOW_OVERLAP
    blank_passages: BlankPassages = "last"
    top_n: int | None = Field(default=None, ge=0)
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    normalize: bool = True
    keep_retrieval_score: bool = False
    mark_unread: bool = True
    timeout: float | None = Field(default=None, ge=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)
    scorer: Annotated[SkipJsonSchema[SupportsRank | None], BeforeValidator(read_scorer)] = Field(
        default=None, exclude=True
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        config = self.scorer_config()
        if self.scorer is not None:
            defaults = ScorerConfig(normalize=self.normalize)
            given = [n for n in _SCORER_FIELDS if getattr(config, n) != getattr(defaults, n)]
            if given:
                raise ConfigError(f"{given} cannot be combined with scorer, which has its own settings")
            if self.timeout is not None and not isinstance(self.scorer, PackageScorer | MissingScorer):
                raise ConfigError(
                    "timeout cannot be combined with a scorer that is not a Scorer, RemoteScorer or "
                    "ServeScorer; limit the time in the scorer"
                )
        self._check_threshold()
        return self

    def _check_threshold(self) -> None:
        if self.scorer is not None and not isinstance(self.scorer, PackageScorer):
            return  # the scale of such a scorer is unknown
        try:
            check_threshold(self.score_threshold, normalize=self.normalize)
        except InputError as error:
            raise ConfigError(f"score_threshold: {error}") from None

    def dump_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return a dump of the options. A scorer of your own is dumped by name, without unused settings."""
        data: dict[str, Any] = handler(self)
        if self.scorer is None:
            return data
        settings = {name: value for name, value in data.items() if name not in _SETTINGS_OF_SHARED_SCORER}
        return {**settings, "scorer": missing_scorer_dump(self.scorer_name())}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        if self.scorer is None:
            return [(name, value) for name, value in super().__repr_args__() if name != "scorer"]
        # Other scorers appear with their type only, because their `repr` may contain an address or a key.
        has_safe_repr = isinstance(self.scorer, Scorer | MissingScorer)
        scorer = self.scorer if has_safe_repr else _Unquoted(type(self.scorer).__name__)
        settings = [
            (name, value)
            for name, value in super().__repr_args__()
            if name != "scorer" and name not in _SETTINGS_OF_SHARED_SCORER
        ]
        return [("scorer", scorer), *settings]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy of this adapter.

        Args:
            update: Options to change in the copy. They are validated like the options of a new adapter.
            deep: Whether to copy the values of the options too.

        Returns:
            The copy.

        Raises:
            pydantic.ValidationError: An option is unknown or invalid.

        Example:
            >>> BGEReranker(model="embedded").model_copy(update={"top_n": 3}).top_n
            3
        """
        copied = super().model_copy(deep=deep)
        if update:
            extra = copied.__pydantic_extra__  # None, unless a subclass allows more options
            fields = type(self).model_fields
            values = {name: value for name, value in copied.__dict__.items() if name in fields}
            checked = _validated(type(self), {**values, **(extra or {}), **update})
            copied._forget_cached_properties()
            copied.__dict__.update(checked.__dict__)
            if extra is not None:
                extra.update(checked.__pydantic_extra__ or {})
            copied.__pydantic_fields_set__.update(update)
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields:
            super().__setattr__(name, value)
            return
        # Pydantic checks options against each other after it has set them, and replaces all of them. This
        # happens in a copy, so an error leaves no trace. An option that another thread sets meanwhile is
        # kept: each query engine of LlamaIndex sets the callback manager.
        checked = super().model_copy()
        before = checked.__dict__.copy()
        super(RerankOptions, checked).__setattr__(name, value)
        new = {
            key: each
            for key, each in checked.__dict__.items()
            if key not in before or each is not before[key]
        }
        if new:
            self._forget_cached_properties()
        self.__dict__.update(new)
        self.__pydantic_fields_set__.add(name)

    def _forget_cached_properties(self) -> None:
        """Let the cached properties of a subclass be computed again. They may depend on the options."""
        for name in self.__dict__.keys() - type(self).model_fields:
            if isinstance(getattr(type(self), name, None), cached_property):
                self.__dict__.pop(name, None)  # another thread may do the same

    def scorer_config(self) -> ScorerConfig:
        """Return the settings of the shared scorer for these options."""
        return ScorerConfig(**{name: getattr(self, name) for name in _SCORER_FIELDS})

    def resolve_scorer(self) -> SupportsRank:
        """Return the scorer that this adapter uses. Load the shared scorer if it is not loaded yet.

        The shared scorer may be closed when this adapter is closed or deleted.
        """
        return Scorer.shared(self.scorer_config(), self) if self.scorer is None else self.scorer

    async def aresolve_scorer(self) -> SupportsRank:
        """Do the same as `resolve_scorer` without blocking the event loop."""
        return await Scorer.ashared(self.scorer_config(), self) if self.scorer is None else self.scorer

    def warmup(self) -> None:
        """Load the model and do all other one-time work, so that no later request waits for it.

        This does nothing if `scorer` is set to an object other than a `Scorer`.

        Raises:
            CheckpointError: The model cannot be used.
        """
        scorer = self.resolve_scorer()
        if isinstance(scorer, Scorer):
            scorer.warmup()

    async def awarmup(self) -> None:
        """Do the same as `warmup` without blocking the event loop."""
        scorer = await self.aresolve_scorer()
        if isinstance(scorer, Scorer):
            await scorer.awarmup()

    def close(self) -> None:
        """Release the model if no other adapter uses it.

        The last existing adapter that used a shared scorer closes it. A shared scorer stays open if your code
        has called `Scorer.shared` for it without a holder. A scorer that was given as `scorer=` stays open
        too. Running calls of this adapter finish or raise `ScorerClosedError`. A later call loads the model
        again.
        """
        Scorer.release(self)

    def scorer_name(self) -> str:
        """Return the name of the model, or the name of the scorer's type if it has no model name."""
        if self.scorer is None:
            return str(self.model)
        if isinstance(self.scorer, MissingScorer):
            return self.scorer.name
        model = self.scorer.config.model if isinstance(self.scorer, Scorer) else None
        # The model of a mock is not a string.
        return model if isinstance(model, str) else type(self.scorer).__name__

    def added_metadata(
        self, metadata: dict[str, Any], passage: RankedPassage, retrieval_score: object
    ) -> dict[str, Any]:
        """Remove from `metadata` what an earlier call has added, and return what this call adds.

        Args:
            metadata: The metadata of the copy that is returned to the user.
            passage: The result of the document.
            retrieval_score: The score of the retriever, or None.
        """
        added: dict[str, Any] = {}
        if self.mark_unread:
            for key in MARKS:
                metadata.pop(key, None)
            added |= marks_of(passage)
        if self.keep_retrieval_score:
            if RETRIEVAL_RANK_KEY in metadata:  # then the score is that of an earlier call, too
                metadata.pop(RETRIEVAL_SCORE_KEY, None)
            added[RETRIEVAL_RANK_KEY] = operator.index(passage.index)
            if retrieval_score is not None:
                added[RETRIEVAL_SCORE_KEY] = retrieval_score
        return added


# The options that choose the shared scorer. They cannot be combined with `scorer=`.
_SETTINGS_OF_SHARED_SCORER = frozenset(_SCORER_FIELDS) - {"normalize"}


def _validated(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Return new options of a class. This does not run an `__init__` that a subclass defines.

    Args:
        kind: The class.
        values: Values by the names of the fields. Other names become extra options, or raise
            `ValidationError`.
    """
    options: Options = kind.__pydantic_validator__.validate_python(
        dict(values), self_instance=kind.__new__(kind), by_name=True, by_alias=False
    )
    return options


class _Unquoted(str):
    """A string whose `repr` has no quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
