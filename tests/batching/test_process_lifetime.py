"""The first calls of a process, the memory that it frees, and its exit."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.engine.cpu.int8_support import int8_obstacle
from bge_rerank_integrations.engine.runner import Runner
from bge_rerank_integrations.errors import RequestTimeoutError
from bge_rerank_integrations.runtime.shutdown import join_until
from tests.support.queues import PATIENCE_S, submit

PAIRS = [("a question", f"passage {number}") for number in range(8)]

FIRST_CALLS = """
    import sys, threading

    calls = []

    def record(frame, event, function):
        if event in ("c_call", "c_return") and getattr(function, "__name__", "") == "tanh":
            calls.append((threading.current_thread().name, event))

    threading.setprofile(record)
    sys.setprofile(record)
    from bge_rerank_integrations import Scorer

    def load():
        global scorer
        scorer = Scorer(sys.argv[1], device="cpu", dtype=sys.argv[2], num_threads=2)

    # Called in the main thread, it would import torch in a thread that `threading.setprofile` does not see.
    loader = threading.Thread(target=load, name="loader")
    loader.start()
    loader.join()
    scorer.score([("a question", f"passage {number}") for number in range(8)])
    sys.setprofile(None)
    print(*(f"{name}:{event}" for name, event in calls))
"""

# On one core, threads of low priority run again only after the main thread has ended.
EXIT_AFTER_ANSWER = """
    import os, sys, threading
    from bge_rerank_integrations import Scorer

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(sys.argv[2]) % len(cores)]})
    scorer = Scorer(sys.argv[1], device="cpu", num_threads=2)
    pairs = [("a question", f"passage {number}") for number in range(8)]
    scorer.score(pairs)
    for thread in threading.enumerate():
        if thread.name.startswith("bge-rerank"):
            os.setpriority(os.PRIO_PROCESS, thread.native_id, 19)
    scorer.score(pairs)
"""

# The batch takes longer than the time limit at exit. Each of its layers takes a small part of that.
EXIT_DURING_BATCH = """
    import sys, threading, time
    from bge_rerank_integrations import Scorer

    scorer = Scorer("embedded", device="cpu", num_threads=int(sys.argv[1]), max_batch_tokens=1 << 14)
    pairs = [("a question", f"{number} " * 400) for number in range(100)]
    threading.Thread(target=scorer.score, args=(pairs,), daemon=True).start()
    while scorer.stats().waiting.p50_ms == 0.0:  # until the first batch has begun
        time.sleep(0.01)
    time.sleep(0.5)
"""


EXIT_WITHOUT_AN_ANSWER = """
    from bge_rerank_integrations.batching.batcher import MicroBatcher
    from bge_rerank_integrations.batching.workers import Replica
    from tests.support.queues import AsyncDevice, ids, submit, wait_until

    device = AsyncDevice()
    batcher = MicroBatcher([Replica(device.launch, lambda: 100, device.depth)])
    future = submit(batcher, [ids(1)])
    wait_until(lambda: device.num_waiting)
"""


def run_child(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_vector_math_is_initialized_before_several_threads_use_it(dtype: str) -> None:
    if dtype == "int8" and (obstacle := int8_obstacle()):
        pytest.skip(f"needs a CPU with int8 instructions: {obstacle}")
    child = run_child(FIRST_CALLS, "embedded", dtype)
    assert child.returncode == 0, child.stderr
    first, second, *others = child.stdout.split()
    assert [first, second] == ["loader:c_call", "loader:c_return"]
    assert {"bge-rerank-cpu-0:c_call", "bge-rerank-cpu-1:c_call"} <= set(others)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux to choose a thread's core")
def test_a_process_with_delayed_worker_threads_exits_cleanly(checkpoint: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        children = list(pool.map(lambda n: run_child(EXIT_AFTER_ANSWER, checkpoint, str(n % 2)), range(40)))
    assert [child.returncode for child in children] == [0] * 40
    assert {child.stderr for child in children} == {""}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_process_that_ends_during_a_long_batch_exits_cleanly(num_threads: int) -> None:
    child = run_child(EXIT_DURING_BATCH, str(num_threads))
    assert (child.returncode, child.stderr) == (0, "")


def test_a_process_whose_device_never_answers_ends() -> None:
    started = time.monotonic()
    child = run_child(EXIT_WITHOUT_AN_ANSWER)
    assert (child.returncode, child.stderr) == (0, "")
    assert time.monotonic() - started < PATIENCE_S / 2, "it did not wait for the device"


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def score(scorer: Scorer) -> None:
    scorer.score(PAIRS)


def score_async(scorer: Scorer) -> None:
    asyncio.run(scorer.ascore(PAIRS))


def time_out(scorer: Scorer) -> None:
    with pytest.raises(RequestTimeoutError):
        scorer.score(PAIRS, timeout=0)


def fail_in_the_engine(scorer: Scorer) -> None:
    """Fail in the forward pass. No text gives a token id that the model lacks, so queue one directly."""
    pipeline: Any = scorer._pipeline
    with pytest.raises(IndexError):
        submit(pipeline._batcher, [np.array([0, 10**8, 2], dtype=np.int32)]).result(60)


@pytest.mark.parametrize("use", [score, score_async, time_out, fail_in_the_engine])
def test_close_releases_the_model_without_the_garbage_collector(
    checkpoint: Path, without_collector: None, use: Callable[[Scorer], None]
) -> None:
    # A unique token budget, so that the scorer of no other test shares the model.
    with Scorer(checkpoint, device="cpu", dtype="float32", num_threads=2, max_batch_tokens=1999) as scorer:
        use(scorer)
        score(scorer)
        assert live_models(1999) == 1
    assert live_models(1999) == 0
    assert scorer.health().state == "closed"


def test_close_releases_the_shared_model_without_the_garbage_collector(
    checkpoint: Path, without_collector: None
) -> None:
    scorer = Scorer.shared(
        ScorerConfig(
            model=str(checkpoint), device="cpu", dtype="float32", num_threads=2, max_batch_tokens=1998
        )
    )
    score(scorer)
    assert live_models(1998) == 1
    scorer.close()
    assert live_models(1998) == 0


def test_a_scorer_that_is_dropped_without_close_releases_its_model(
    checkpoint: Path, without_collector: None
) -> None:
    scorer = Scorer(checkpoint, device="cpu", dtype="float32", num_threads=2, max_batch_tokens=1997)
    score(scorer)
    assert live_models(1997) == 1
    del scorer
    for thread in threading.enumerate():
        if thread.name == "bge-rerank-worker":
            thread.join(20)  # the worker ends after a few idle seconds
    assert live_models(1997) == 0


def live_models(max_batch_tokens: int) -> int:
    return sum(
        type(each) is Runner and each.max_batch_tokens == max_batch_tokens for each in gc.get_objects()
    )


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to threads")
def test_ctrl_c_while_threads_end_does_not_make_them_look_ended() -> None:
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, daemon=True)
    thread.start()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        join_until([thread], None)
    assert thread.is_alive()
    assert not join_until([thread], time.monotonic())
    may_end.set()
    assert join_until([thread], None)
    timer.join()


def test_close_at_exit_does_not_wait_for_calls_of_daemon_threads(checkpoint: Path) -> None:
    code = """
        import atexit, sys, threading, time

        def close():
            may_call.set()
            has_called.wait(60)
            time.sleep(0.1)
            scorer.close()
            print("closed")

        atexit.register(close)  # before the import, so that it runs after the package's own cleanup
        from bge_rerank_integrations import Scorer

        scorer = Scorer(sys.argv[1], device="cpu", dtype="float32")
        may_call, has_called = threading.Event(), threading.Event()

        def call():
            may_call.wait(60)
            has_called.set()
            scorer.rank("a", ["b", "c"])

        threading.Thread(target=call, daemon=True).start()
    """
    completed = run_child(code, checkpoint)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "closed\n", "")


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to threads")
def test_a_process_ends_well_after_ctrl_c_in_close(checkpoint: Path) -> None:
    code = """
        import signal, sys, threading
        from bge_rerank_integrations import Scorer

        scorer = Scorer(sys.argv[1], device="cpu", max_batch_tokens=512, long_passages="windows")
        passages = [f"passage number {number} " + "word " * 10_000 for number in range(30)]
        caller = threading.Thread(target=lambda: print(len(scorer.rank("a", passages))))
        caller.start()
        while not scorer.health().queued_tokens:
            pass
        main = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
        try:
            scorer.close()
            print("not interrupted")
        except KeyboardInterrupt:
            print("interrupted")
        scorer.close()
        print("closed")
    """
    completed = run_child(code, checkpoint)
    assert completed.stderr == ""
    assert completed.returncode == 0
    assert sorted(completed.stdout.split()) == ["30", "closed", "interrupted"]
