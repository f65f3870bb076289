"""`SharedObjects`: objects that a process creates once per key, and drops when nobody uses them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Generic, TypeVar
from weakref import WeakValueDictionary

from bge_rerank_integrations.errors import InputTypeError, RerankError
from bge_rerank_integrations.runtime.fork_guard import call_in_forked_children
from bge_rerank_integrations.runtime.locks import SafeFuture, SafeLock
from bge_rerank_integrations.runtime.uninterrupted import run_uninterrupted

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_IS_CREATED_HERE: Final = (
    "this call is part of loading the same scorer, for example in a logging handler; load the scorer before, "
    "with warmup()"
)


@dataclass
class _Entry(Generic[T]):
    """An object and its users.

    Attributes:
        future: Gives the object when it is created.
        is_done: Whether the object exists, or its creation has failed. The future must not be asked under the
            lock of `SharedObjects`. The garbage collector may call `release` while the lock of the future is
            held, and the two locks would be taken in both orders.
        value: The object, once it exists.
        holders: The users of the object, by `id`. The references are weak, so a deleted user no longer
            counts.
        is_pinned: Whether somebody asked for the object without a holder. `release` never drops it.
        creator: The thread that creates the object, by `threading.get_ident`.
    """

    future: SafeFuture[T] = field(default_factory=SafeFuture)
    is_done: bool = False
    value: T | None = None
    holders: WeakValueDictionary[int, object] = field(default_factory=WeakValueDictionary)
    is_pinned: bool = False
    creator: int = field(default_factory=threading.get_ident)

    @property
    def is_created_here(self) -> bool:
        """Whether this thread is creating the object."""
        return self.creator == threading.get_ident() and not self.is_done

    def add(self, holder: object | None) -> None:
        if holder is None:
            self.is_pinned = True
            return
        try:
            self.holders[id(holder)] = holder
        except TypeError:
            raise InputTypeError(
                f"a {type(holder).__name__} cannot be a holder, because Python takes no weak references to "
                "it; use an instance of a class of your own, or None"
            ) from None


class SharedObjects(Generic[K, T]):
    """The objects that a process shares, by key. Any number of threads can use it.

    Example:
        >>> shared = SharedObjects()
        >>> shared.get("a", None, list) is shared.get("a", None, list)
        True
    """

    def __init__(self) -> None:
        self._entries: dict[K, _Entry[T]] = {}
        # The garbage collector may run the `__del__` of a holder, which calls `release`, in any thread.
        self._lock = SafeLock()
        call_in_forked_children(self._begin_anew)

    def get(self, key: K, holder: object | None, create: Callable[[K], T]) -> T:
        """Return the object of a key. The first call creates it, and other threads wait for it.

        Args:
            key: The key.
            holder: The user of the object, which must call `release` later. None keeps the object until
                `discard` is called.
            create: Creates the object of a key.

        Returns:
            The object.

        Raises:
            InputTypeError: Python takes no weak references to the holder.
            RerankError: `create` has called this method for the same key, for example through a handler of
                its log messages.
            Exception: The exception of `create`. All waiting callers get it. The next call tries again.
            BaseException: Ctrl-C interrupted this call. The other callers do not get it. If the object does
                not exist yet, one of them creates it.
        """
        while True:
            entry = _Entry[T]()
            is_first = False
            try:
                with self._lock:
                    entry = self._entries.get(key, entry)
                    entry.add(holder)
                    is_first = key not in self._entries
                    self._entries[key] = entry
                if is_first:
                    run_uninterrupted(partial(self._set_result, entry, create(key)))
                elif entry.is_created_here:
                    raise RerankError(_IS_CREATED_HERE)
                return entry.future.result()
            except BaseException as error:
                # `create` has failed, or Ctrl-C came between the lines above.
                if is_first:
                    run_uninterrupted(partial(self._set_exception, key, entry, error))
                is_of_other_caller = not is_first and _is_exception_of(entry.future, error)
                if isinstance(error, Exception) or not is_of_other_caller:
                    raise
                # Ctrl-C has interrupted the caller that created the object, but not this one.
            finally:
                # The exception of a failed creation refers to this frame. Without the reference from this
                # frame to the exception there is no cycle, and the memory of the failed attempt is freed with
                # the exception.
                del entry

    def get_ready(self, key: K, holder: object | None) -> T | None:
        """Do the same as `get` if the object exists. Return None if it would have to be created."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.is_done:
                return None
            entry.add(holder)
            return entry.value

    def release(self, holder: object) -> list[T]:
        """Remove a holder. Return the objects that nobody uses any more, which are dropped.

        Among them are the objects whose holders have been deleted. A holder may be one of these itself: the
        garbage collector removes weak references to an object before it runs the object's `__del__`.

        Raises:
            RerankError: This thread is creating an object for the holder, for example in a logging handler.
        """
        unused: list[Future[T]] = []
        with self._lock:
            # The garbage collector may call this method in every line here, and remove entries. Even the
            # result of `dict.copy` would then be damaged, because it is allocated half-way.
            keys = list(self._entries)
            entries = [(key, entry) for key in keys if (entry := self._entries.get(key)) is not None]
            if any(entry.is_created_here and id(holder) in entry.holders for _, entry in entries):
                raise RerankError(_IS_CREATED_HERE)
            for key, entry in entries:
                was_held = entry.holders.pop(id(holder), None) is not None
                is_unused = (was_held or entry.is_done) and not entry.holders and not entry.is_pinned
                if is_unused and self._entries.pop(key, None) is not None:
                    unused.append(entry.future)
        return [future.result() for future in unused if future.exception() is None]

    def discard(self, key: K, value: T) -> None:
        """Drop an object, if it is the shared object of its key."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_done and entry.value is value:
                del self._entries[key]

    def _set_result(self, entry: _Entry[T], value: T) -> None:
        with self._lock:
            if entry.is_done:
                return
            entry.is_done, entry.value = True, value
        entry.future.set_result(value)

    def _set_exception(self, key: K, entry: _Entry[T], error: BaseException) -> None:
        """Pass an error to the waiting callers, unless the object exists. The next call tries again."""
        with self._lock:
            if entry.is_done:
                return
            entry.is_done = True
            if self._entries.get(key) is entry:
                del self._entries[key]
        entry.future.set_exception(error)

    def _begin_anew(self) -> None:
        """Forget all objects in a forked child. Their threads and devices do not work there."""
        # The objects stay in memory, because the child cannot release their threads and devices. The lock is
        # replaced, because a thread of the parent may have held it.
        self._inherited = self._entries
        self._entries = {}
        self._lock = SafeLock()


def _is_exception_of(future: Future[T], error: BaseException) -> bool:
    return future.done() and future.exception() is error
