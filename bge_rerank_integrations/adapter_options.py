"""The options that both framework adapters have, in one place: same names, order and defaults."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import Self

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
from bge_rerank_integrations.ranking import RankedPassage, Ranking, check_threshold
from bge_rerank_integrations.scorer import OwnScorer, Scorer, SupportsRank
from bge_rerank_integrations.validation import MAX_TIMEOUT_S

Model = TypeVar("Model", bound=BaseModel)

TRUNCATED_KEY: Final = "rerank_truncated"
BLANK_KEY: Final = "rerank_blank"
MARKS: Final = (TRUNCATED_KEY, BLANK_KEY)
"""Metadata keys that tell of a document that was not read whole."""

_SCORER_FIELDS = tuple(field.name for field in dataclasses.fields(ScorerConfig))
# In a dump, the key beside which the name of a scorer stands that the dump does not hold.
_MISSING_SCORER = "give_again"

# To pydantic it is a string, so that an error names the option once and a schema shows what is dumped.
PathOrName = Annotated[
    str | os.PathLike[str],
    GetPydanticSchema(lambda _, handler: handler(str)),
    BeforeValidator(path_to_str),
]
# Kept as a tuple. Dumped as a list, which is what JSON has, so that what is dumped equals what is read back.
Names = Annotated[Sequence[str], AfterValidator(tuple), PlainSerializer(list, return_type=list[str])]


class MissingScorer:
    """Stands in an adapter read back from a dump for the scorer that the dump does not hold.

    Args:
        name: The name of the scorer that the adapter had.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def rank(
        self,
        query: str,  # noqa: ARG002
        passages: Sequence[str],  # noqa: ARG002
        top_n: int | None = None,  # noqa: ARG002
        threshold: float | None = None,  # noqa: ARG002
    ) -> Sequence[RankedPassage]:
        """Raise `ConfigError`."""
        self._refuse()

    async def arank(
        self,
        query: str,  # noqa: ARG002
        passages: Sequence[str],  # noqa: ARG002
        top_n: int | None = None,  # noqa: ARG002
        threshold: float | None = None,  # noqa: ARG002
    ) -> Sequence[RankedPassage]:
        """Raise `ConfigError`."""
        self._refuse()

    def __repr__(self) -> str:
        return f"MissingScorer({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MissingScorer) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"this adapter was made with scorer= ({self.name}) and read back from a dump, which does not "
            "hold the scorer; give scorer= again"
        )


def _read_scorer(value: Any) -> Any:
    if isinstance(value, Mapping) and list(value) == [_MISSING_SCORER]:
        name = value[_MISSING_SCORER]
        if isinstance(name, str):
            return MissingScorer(name)
    return value


class RerankOptions(BaseModel):
    """Fields of an adapter; those up to `blank_passages` are explained in `ScorerConfig`.

    Attributes:
        top_n: Most documents to return; None is all, 0 is none.
        score_threshold: Least score to return, inclusive, on the scale of the scores: above 0 and at most 1
            with `normalize=True`, else any finite number. None returns every document.
        normalize: Scores of 0..1 through a sigmoid, the default here, since that is how frameworks
            read a relevance score; False gives raw logits, the default of `Scorer`.
        keep_retrieval_score: Keep what the retriever thought in the metadata of what is returned, as
            `retrieval_score` (where it gave one) and `retrieval_rank` (from 0).
        mark_unread: Tell in the metadata of what is returned that it was not read whole: `rerank_truncated`
            is True if its end did not fit into the model, `rerank_blank` if it has nothing to read and was
            not scored. A document that was read whole gets neither key. LlamaIndex shows these keys to no LLM
            and no embedding model.
        timeout: Most seconds for one call, from the first text that is tokenized to the last score; None is
            no limit. Loading the model does not count: call `warmup` first. When the time is over, the call
            raises `RequestTimeoutError`, and what has not started is dropped.
        scorer: A scorer of one's own: a `Scorer`, a `RemoteScorer`, or anything with its `rank` and
            `arank`. It has its own settings, so those above up to `blank_passages` cannot be given beside
            it. `normalize` and `timeout` apply to the first two. The scores of any other are taken as they
            are, and it must limit its time itself. None, the default, uses the process's shared scorer for
            these settings, loaded at first use. A scorer is in no dump, since it may hold an address or a
            key. An adapter that is read back from such a dump raises `ConfigError` until it is given one
            again.
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
    scorer: Annotated[SkipJsonSchema[SupportsRank | None], BeforeValidator(_read_scorer)] = Field(
        default=None, exclude=True
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        config = self.scorer_config()
        if self.scorer is not None:
            defaults = ScorerConfig(normalize=self.normalize)
            given = [n for n in _SCORER_FIELDS if getattr(config, n) != getattr(defaults, n)]
            if given:
                raise ConfigError(f"{given} cannot be set beside scorer, which has its own settings")
            if self.timeout is not None and not isinstance(self.scorer, OwnScorer | MissingScorer):
                raise ConfigError("timeout cannot be set beside a scorer that is no Scorer; give it its own")
        self._check_threshold()
        return self

    def _check_threshold(self) -> None:
        if self.scorer is not None and not isinstance(self.scorer, OwnScorer):
            return  # only the owner of another scorer knows its scale
        try:
            check_threshold(self.score_threshold, normalize=self.normalize)
        except InputError as error:
            raise ConfigError(f"score_threshold: {error}") from None

    def dump_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return a dump; one made with a scorer names it instead of the settings it does not use."""
        data: dict[str, Any] = handler(self)
        if self.scorer is None:
            return data
        settings = {name: value for name, value in data.items() if name not in _UNUSED_FIELDS}
        return {**settings, "scorer": {_MISSING_SCORER: self.scorer_name()}}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        if self.scorer is None:
            return [(name, value) for name, value in super().__repr_args__() if name != "scorer"]
        # The type alone of a scorer that is not ours, since its own text may show an address or a key.
        is_own = isinstance(self.scorer, Scorer | MissingScorer)
        scorer = self.scorer if is_own else _Unquoted(type(self.scorer).__name__)
        settings = [
            (name, value)
            for name, value in super().__repr_args__()
            if name != "scorer" and name not in _UNUSED_FIELDS
        ]
        return [("scorer", scorer), *settings]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy.

        Args:
            update: Options to change in the copy. They are checked like those of a new adapter.
            deep: Copy the values of the options too.

        Raises:
            pydantic.ValidationError: An option is unknown or cannot work.
        """
        copied = super().model_copy(deep=deep)
        if update:
            checked = type(self).model_validate({**copied.__dict__, **update})
            copied.__dict__.update(checked.__dict__)
            copied.__pydantic_fields_set__.update(update)
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.copy()
        try:
            super().__setattr__(name, value)
        except ValidationError:
            # What is checked together is checked after it is set; a refused value must not stay.
            self.__dict__.update(before)
            raise

    def scorer_config(self) -> ScorerConfig:
        """Return the settings of the shared scorer that these options ask for."""
        return ScorerConfig(**{name: getattr(self, name) for name in _SCORER_FIELDS})

    def resolve_scorer(self) -> SupportsRank:
        """Return the scorer to use, loading the shared one if nobody has.

        A shared scorer may be closed when this adapter is closed or gone.
        """
        return Scorer.shared(self.scorer_config(), self) if self.scorer is None else self.scorer

    async def aresolve_scorer(self) -> SupportsRank:
        """Return the scorer to use; a model that is not loaded yet is loaded off the event loop."""
        return await Scorer.ashared(self.scorer_config(), self) if self.scorer is None else self.scorer

    def warmup(self) -> None:
        """Load the model and do all else that happens once, so that no user's request waits for it.

        A scorer of one's own that is no `Scorer` is left alone.

        Raises:
            CheckpointError: The model cannot be used.
        """
        scorer = self.resolve_scorer()
        if isinstance(scorer, Scorer):
            scorer.warmup()

    async def awarmup(self) -> None:
        """Do what `warmup` does, off the event loop."""
        scorer = await self.aresolve_scorer()
        if isinstance(scorer, Scorer):
            await scorer.awarmup()

    def close(self) -> None:
        """Release the model if no other adapter uses it.

        A shared scorer is closed by the last of the adapters that have used it, counting those that still
        exist. It stays open where somebody has called `Scorer.shared` for it. A scorer given as `scorer=`
        is left to its owner. Calls of this adapter that are under way are finished or raise
        `ScorerClosedError`. A later call loads the model again.
        """
        Scorer.release(self)

    def scorer_name(self) -> str:
        """Return the model's name, or the type of a scorer that has none."""
        if self.scorer is None:
            return self.scorer_config().model
        if isinstance(self.scorer, MissingScorer):
            return self.scorer.name
        model = self.scorer.config.model if isinstance(self.scorer, Scorer) else None
        return model if isinstance(model, str) else type(self.scorer).__name__  # a mock's is no string

    def rank_texts(
        self,
        scorer: SupportsRank,
        query: str,
        texts: Sequence[str],
        top_n: int | None,
        threshold: float | None,
    ) -> Sequence[RankedPassage]:
        """Rank texts on this adapter's scale and within its timeout."""
        if isinstance(scorer, OwnScorer):
            return scorer.rank(query, texts, top_n, threshold, timeout=self.timeout, normalize=self.normalize)
        return scorer.rank(query, texts, top_n, threshold)

    async def arank_texts(
        self,
        scorer: SupportsRank,
        query: str,
        texts: Sequence[str],
        top_n: int | None,
        threshold: float | None,
    ) -> Sequence[RankedPassage]:
        """Do what `rank_texts` does, off the event loop."""
        if isinstance(scorer, OwnScorer):
            return await scorer.arank(
                query, texts, top_n, threshold, timeout=self.timeout, normalize=self.normalize
            )
        return await scorer.arank(query, texts, top_n, threshold)


# What a scorer of one's own has in its own settings; `normalize` applies to it.
_UNUSED_FIELDS = frozenset(_SCORER_FIELDS) - {"normalize"}


class _Unquoted(str):
    """A name that shows in a `repr` without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def independent_copy(model: Model, *, shared: Iterable[str] = ()) -> Model:
    """Return a copy of a pydantic model that can be edited without a change of the original.

    Values that cannot be copied are kept as they are.

    Args:
        model: What to copy.
        shared: Names of fields whose values are kept.
    """
    copied = model.model_copy()
    for name in copied.__dict__.keys() - set(shared):
        copied.__dict__[name] = _copy_value(copied.__dict__[name])
    return copied


def _copy_value(value: Any) -> Any:
    if type(value) is list and set(map(type, value)) <= {int, float, str}:
        return value.copy()  # an embedding, for which a deep copy takes a hundred times as long
    try:
        return copy.deepcopy(value)
    except Exception:
        return {key: _copy_value(each) for key, each in value.items()} if type(value) is dict else value


def marks_of(passage: RankedPassage) -> dict[str, bool]:
    """Return the metadata that `mark_unread` adds; nothing where a foreign scorer does not tell."""
    told = {
        TRUNCATED_KEY: getattr(passage, "truncated", False),
        BLANK_KEY: getattr(passage, "blank", False),
    }
    return {key: True for key, value in told.items() if value}


def summarize(ranked: Sequence[RankedPassage], num_pairs: int) -> dict[str, int | None]:
    """Return the figures of a ranking that traces show; what a foreign scorer does not say is None."""
    own = ranked if isinstance(ranked, Ranking) else None
    return {
        "num_pairs": num_pairs,
        "num_tokens": None if own is None else own.num_tokens,
        "num_truncated": None if own is None else own.num_truncated,
        "num_truncated_queries": None if own is None else own.num_truncated_queries,
        "num_blank": None if own is None else own.num_blank,
        "num_returned": len(ranked),
    }


def summarize_all(
    rankings: Sequence[Sequence[RankedPassage]], num_pairs: Sequence[int]
) -> dict[str, int | None]:
    """Return the sums of the figures of several rankings; one that any of them does not say is None."""
    figures = [summarize(ranked, number) for ranked, number in zip(rankings, num_pairs, strict=True)]
    totals: dict[str, int | None] = {}
    for name in summarize((), 0):
        values = [each[name] for each in figures]
        totals[name] = None if None in values else sum(filter(None, values))
    return totals
