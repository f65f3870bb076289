"""The options that both framework adapters have, in one place: same names, order and defaults."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
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
)
from bge_rerank_integrations.errors import ConfigError, InputError
from bge_rerank_integrations.ranking import RankedPassage, Ranking, check_threshold
from bge_rerank_integrations.scorer import Scorer, SupportsRank

TRUNCATED_KEY: Final = "rerank_truncated"
BLANK_KEY: Final = "rerank_blank"
MARKS: Final = (TRUNCATED_KEY, BLANK_KEY)
"""Metadata keys that tell of a document that was not read whole."""

_SCORER_FIELDS = tuple(field.name for field in dataclasses.fields(ScorerConfig))


def _path_to_str(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathOrName = Annotated[str, BeforeValidator(_path_to_str)]
# A list where JSON has one, so that what is dumped equals what is read back.
DeviceNames = Annotated[tuple[str, ...], PlainSerializer(list, return_type=list[str])]


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
        scorer: A scorer of one's own: anything with `rank` and `arank`. It scores by its own settings,
            so none of those above may be given beside it, and `normalize` is not applied. None, the
            default, uses the process's shared scorer for these settings, loaded at first use. It is in no
            dump, since it may hold an address or a key: give it again to what is read back from one.
    """

    model_config = ConfigDict(
        extra="forbid",
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
    devices: DeviceNames | None = None
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
    top_n: int | None = Field(default=None, ge=0, strict=True)
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    normalize: bool = True
    keep_retrieval_score: bool = False
    mark_unread: bool = True
    scorer: SkipJsonSchema[SupportsRank | None] = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        config = self.scorer_config()
        if self.scorer is not None:
            defaults = ScorerConfig(normalize=self.normalize)
            given = [n for n in _SCORER_FIELDS if getattr(config, n) != getattr(defaults, n)]
            if given:
                raise ConfigError(f"{given} cannot be set beside scorer, which has its own settings")
        self._check_threshold()
        return self

    def _check_threshold(self) -> None:
        config = self.scorer_config() if self.scorer is None else getattr(self.scorer, "config", None)
        if not isinstance(config, ScorerConfig):
            return  # a foreign scorer: only its owner knows its scale
        try:
            check_threshold(self.score_threshold, normalize=config.normalize)
        except InputError as error:
            raise ConfigError(f"score_threshold: {error}") from None

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
        """Return the scorer to use, loading the shared one if nobody has."""
        return Scorer.shared(self.scorer_config()) if self.scorer is None else self.scorer

    async def aresolve_scorer(self) -> SupportsRank:
        """Return the scorer to use; a model that is not loaded yet is loaded off the event loop."""
        return await Scorer.ashared(self.scorer_config()) if self.scorer is None else self.scorer

    def scorer_name(self) -> str:
        """Return the model's name, or the type of a scorer that has none."""
        if self.scorer is None:
            return self.model
        return self.scorer.config.model if isinstance(self.scorer, Scorer) else type(self.scorer).__name__


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
