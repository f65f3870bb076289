"""Scorers that a process shares: their holders, and what a forked child gets."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.errors import InputTypeError
from bge_rerank_integrations.runtime.shared_objects import SharedObjects
from tests.support.interrupts import Interrupt, InterruptError, call_at, stop
from tests.support.queues import PATIENCE_S, wait_until


def test_the_garbage_collector_may_release_holders_at_any_time() -> None:
    """A release within a release must not disturb it."""
    shared: SharedObjects[int, object] = SharedObjects()

    class InCycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            shared.release(self)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(3000):
            shared.get(number, InCycle(), lambda _: object())
            shared.release(InCycle())
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    shared.release(InCycle())
    assert not shared._entries


def test_release_does_not_wait_for_the_lock_of_a_future() -> None:
    """The garbage collector may call it while another thread holds that lock and waits for `release`."""

    class Holder:
        pass

    shared: SharedObjects[str, object] = SharedObjects()
    value, holder = object(), Holder()
    shared.get("a", holder, lambda _: value)
    for call in (
        partial(shared.get_ready, "a", holder),
        partial(shared.release, object()),
        partial(shared.discard, "a", value),
    ):
        thread = threading.Thread(target=call, daemon=True)
        with shared._entries["a"].future._condition:
            thread.start()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# The parent defines `call`. A child that hangs is ended by a signal.
FORK = """
    import asyncio, os, signal, sys, threading, time
    from bge_rerank_integrations import Scorer, ScorerConfig
    from bge_rerank_integrations.errors import CheckpointNotFoundError, ForkedProcessError
    from bge_rerank_integrations.runtime.shared_objects import SharedObjects

    config = ScorerConfig(model=sys.argv[1], device="cpu", dtype="float32")
    {parent}
    time.sleep(0.2)  # the threads of the parent are idle
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            {call}
            os._exit(7)
        except ForkedProcessError:
            os._exit(8)
    print(os.waitpid(child, 0)[1] >> 8 or "killed", flush=True)
    os._exit(0)
"""
LOADED, FORKED = "7", "8"


class Holder:
    """An object that uses a scorer."""

    def __init__(self, config: ScorerConfig) -> None:
        self.scorer = Scorer.shared(config, self)
        self.itself = self  # only the garbage collector deletes it

    def __del__(self) -> None:
        Scorer.release(self)


def config_of(checkpoint: Path, **options: object) -> ScorerConfig:
    return ScorerConfig(model=checkpoint, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("holder", [object(), "a string", (1, 2)])
def test_a_holder_without_weak_references_is_refused_and_blocks_nobody(
    checkpoint: Path, holder: object
) -> None:
    config = config_of(checkpoint, max_length=400)
    with pytest.raises(InputTypeError, match=f"a {type(holder).__name__} cannot be a holder"):
        Scorer.shared(config, holder)
    with Scorer.shared(config) as scorer:
        assert scorer.health().state == "ok"


def test_a_holder_may_release_its_scorer_when_the_garbage_collector_deletes_it(checkpoint: Path) -> None:
    scorer = Holder(config_of(checkpoint, max_length=401)).scorer
    gc.collect()
    assert scorer.health().state == "closed"


def test_an_interrupted_call_blocks_no_later_one() -> None:
    for line in count():
        shared = SharedObjects[str, str]()

        def interrupt(lock: Any = shared._lock) -> None:
            # A trace function is also called between the last statement of a `with` block and `__exit__`,
            # where no signal arrives.
            if not lock._is_owned():
                stop()

        is_reached = call_at(
            line, {SharedObjects.get}, interrupt, partial(shared.get, "key", None, str.upper)
        )
        found: Queue[str] = Queue()
        threading.Thread(
            target=lambda shared=shared, found=found: found.put(shared.get("key", None, str.upper)),
            daemon=True,
        ).start()
        assert found.get(timeout=PATIENCE_S) == "KEY"
        if not is_reached:
            break
    assert line > 4


def test_ctrl_c_while_an_object_becomes_ready_leaves_no_caller_waiting() -> None:
    for number in count():
        shared = SharedObjects[str, str]()
        interrupt = Interrupt(number)
        found: Queue[str] = Queue()

        def create(
            key: str, shared: Any = shared, found: Any = found, arm: Callable[[], None] = interrupt.arm
        ) -> str:
            for _ in range(3):
                threading.Thread(
                    target=lambda: found.put(shared.get("key", None, str.upper)), daemon=True
                ).start()
            wait_until(lambda: len(shared._entries["key"].future._condition._waiters) == 3)
            arm()
            return key.upper()

        interrupt.call(partial(shared.get, "key", None, create))
        assert [found.get(timeout=PATIENCE_S) for _ in range(3)] == ["KEY"] * 3
        if not interrupt.is_reached:
            break
    assert number > 10


def test_a_waiting_caller_creates_the_object_after_an_interrupt_of_the_first_one() -> None:
    """The first caller gets the interrupt, and the other one does not."""
    shared = SharedObjects[str, str]()
    found: Queue[str] = Queue()
    keys: list[str] = []

    def create(key: str) -> str:
        keys.append(key)
        if len(keys) == 1:
            waiting = threading.Thread(
                target=lambda: found.put(shared.get("key", None, str.upper)), daemon=True
            )
            waiting.start()
            condition: Any = shared._entries["key"].future._condition
            wait_until(lambda: condition._waiters)
            raise InterruptError
        return "created again"

    with pytest.raises(InterruptError):
        shared.get("key", None, create)
    assert found.get(timeout=PATIENCE_S) == "KEY"
    assert keys == ["key"]


def run_forked(parent: str, call: str, checkpoint: Path) -> str:
    code = textwrap.dedent(FORK).format(parent=parent, call=call)
    completed = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, timeout=200, check=True
    )
    return completed.stdout.strip()


@needs_fork
@pytest.mark.parametrize(
    "call",
    [
        "asyncio.run(scorer.arank('a', ['b']))",
        "asyncio.run(scorer.ascore([('a', 'b')], timeout=30))",
        "asyncio.run(scorer.awarmup())",
        "asyncio.run(Scorer.ashared(config))",
        "Scorer.shared(config)",
    ],
)
def test_a_forked_child_gets_the_same_error_from_async_calls(checkpoint: Path, call: str) -> None:
    parent = "scorer = asyncio.run(Scorer.ashared(config)); asyncio.run(scorer.arank('a', ['b']))"
    assert run_forked(parent, call, checkpoint) == FORKED


@needs_fork
def test_a_forked_child_loads_a_model_if_its_parent_has_loaded_none(checkpoint: Path) -> None:
    missing = "asyncio.run(Scorer.ashared(ScorerConfig(model='/nonexistent/folder')))"
    parent = f"try: {missing}\nexcept CheckpointNotFoundError: pass"
    call = "asyncio.run(asyncio.run(Scorer.ashared(config)).arank('a', ['b']))"
    assert run_forked(parent, call, checkpoint) == LOADED


@needs_fork
def test_a_forked_child_does_not_wait_for_an_object_that_its_parent_creates(checkpoint: Path) -> None:
    parent = (
        "shared = SharedObjects(); threading.Thread("
        "target=shared.get, args=('key', None, lambda _: time.sleep(600)), daemon=True).start()"
    )
    call = "assert shared.get('key', None, str.upper) == 'KEY'"
    assert run_forked(parent, call, checkpoint) == LOADED
