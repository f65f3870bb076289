"""The scorer of an adapter that was loaded from a dump, which contains only the name of the scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from bge_rerank_integrations.errors import ConfigError
from bge_rerank_integrations.ranking import RankedPassage

# In a dump, the key of the name of the scorer that must be given again.
_KEY = "give_again"


class MissingScorer:
    """Takes the place of a scorer in an adapter that was loaded from a dump. Dumps do not contain scorers.

    Args:
        name: The name of the scorer that the dumped adapter had.
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
            f"this adapter was created with scorer= ({self.name}) and then loaded from a dump, which does "
            "not contain the scorer; set scorer= again"
        )


def missing_scorer_dump(name: str) -> dict[str, str]:
    """Return what a dump contains for a scorer with this name."""
    return {_KEY: name}


def read_scorer(value: Any) -> Any:
    """Return a `MissingScorer` for the value of `missing_scorer_dump`, and any other value unchanged.

    Raises:
        ConfigError: The value is a class or a string, which are often given by mistake.
    """
    if isinstance(value, type):  # a class has the methods of a scorer, too
        raise ConfigError(f"scorer is the class {value.__name__}; give an instance of it")
    if isinstance(value, str):
        raise ConfigError("scorer is a string; give a model as model=, and a server as RemoteScorer(url)")
    if isinstance(value, Mapping) and list(value) == [_KEY]:
        name = value[_KEY]
        if isinstance(name, str):
            return MissingScorer(name)
    return value
