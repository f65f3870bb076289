"""The methods of scorers that the framework adapters call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bge_rerank_integrations.ranking import RankedPassage, Ranking

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class SupportsRank(Protocol):
    """The methods of a scorer that the framework adapters call.

    `Scorer` implements them. You can pass any object with these methods to an adapter as `scorer=`. Its
    methods must sort the passages, and apply `top_n` and `threshold`. The adapters do not do this again.

    Example:
        >>> isinstance(Scorer("embedded"), SupportsRank)
        True
    """

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> Sequence[RankedPassage]:
        """Return passages ranked best first; see `Scorer.rank`.

        Each passage has the index of one of the given passages, and a score that is not NaN. The adapters
        raise `ConfigError` otherwise.

        An implementation decides how it treats passages that are blank. The adapters copy
        `RankedPassage.blank` and `RankedPassage.truncated` into the metadata of the document or node.
        """

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
    ) -> Sequence[RankedPassage]:
        """Do the same as `rank` without blocking the event loop; see `Scorer.arank`."""


class PackageScorer(ABC):
    """Base class of the scorers of this package, whose methods accept `timeout` and `normalize`.

    The adapters pass their `normalize` and `timeout` to such a scorer, and rank several requests in one call.
    """

    @abstractmethod
    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> Ranking:
        """Return passages ranked best first; see `Scorer.rank`."""

    @abstractmethod
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

    @abstractmethod
    def rank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Rank the passages of several queries; see `Scorer.rank_many`."""

    @abstractmethod
    async def arank_many(
        self,
        requests: Iterable[tuple[str, Sequence[str]]],
        top_n: int | None = None,
        threshold: float | None = None,
        *,
        timeout: float | None = None,
        normalize: bool | None = None,
    ) -> list[Ranking]:
        """Do the same as `rank_many` without blocking the event loop."""

    # A scorer owns the memory of a device, or connections. A copy is therefore the same scorer.
    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self
