"""Deep copies of documents and nodes, which both framework adapters return."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

# Values of these types cannot be changed, so that a copy may share them.
_ATOMS: Final = frozenset({int, float, str, bool, type(None)})
# Number of copies after which the event loop runs other tasks.
_ITEMS_PER_TURN: Final = 8


def independent_copy(model: Model, *, shared: Iterable[str] = ()) -> Model:
    """Return a deep copy of a pydantic model. Values that cannot be copied are shared with the original.

    Args:
        model: The model to copy.
        shared: Names of fields whose values are shared instead of copied.

    Returns:
        The copy.
    """
    copied = model.model_copy()
    copies: dict[int, Any] = {}
    for values in (copied.__dict__, copied.__pydantic_extra__, copied.__pydantic_private__):
        for name in (values or {}).keys() - set(shared):
            values[name] = _copy_value(values[name], copies)  # type: ignore[index]
    return copied


def _copy_value(value: Any, copies: dict[int, Any]) -> Any:
    """Copy a value. A value that cannot be copied, or that is nested too deeply, is shared.

    Args:
        value: The value.
        copies: The copies so far, by the ids of their originals. A value that occurs again is copied once.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in copies:
        return copies[id(value)]
    if kind is list and set(map(type, value)) <= _ATOMS:
        copies[id(value)] = value.copy()  # for an embedding, `deepcopy` is a hundred times slower
        return copies[id(value)]
    try:
        if kind is dict:
            return _copy_dict(value, copies)
        if kind is list:
            items = copies[id(value)] = []
            for item in value:
                items.append(_copy_value(item, copies))  # noqa: PERF401  # an item may be the list itself
            return items
        if kind is tuple:
            return copies.setdefault(id(value), tuple([_copy_value(item, copies) for item in value]))
        return _copy_object(value, copies)
    except RecursionError:
        copies.pop(id(value), None)  # it may be incomplete
        return value


def _copy_object(value: Any, copies: dict[int, Any]) -> Any:
    try:
        copied = copy.deepcopy(value, _Memo(copies))
    except Exception:
        if isinstance(value, dict):  # of a subclass
            return _copy_dict(value, copies)
        copied = value
    copies[id(value)] = copied
    return copied


def _copy_dict(value: dict[Any, Any], copies: dict[int, Any]) -> dict[Any, Any]:
    copied = copies[id(value)] = {}
    for key, item in value.items():
        copied[key] = _copy_value(item, copies)
    return copied


class _Memo(dict[int, Any]):
    """The memo of a call of `deepcopy`. It finds earlier copies, but adds none to them: the call may fail."""

    def __init__(self, copies: dict[int, Any]) -> None:
        super().__init__()
        self._copies = copies

    def get(self, key: int, default: Any = None) -> Any:
        """Return the copy of an object by its id."""
        return super().get(key, self._copies.get(key, default))


async def yielding_now_and_then(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield items, and let other tasks run after every few of them. Copying a document can take 0.4 ms."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % _ITEMS_PER_TURN == 0:
            await asyncio.sleep(0)
