"""Signal handlers that raise while a model loads: the caller gets their exception, and the load is not harmed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from concurrent.futures import Future
from pathlib import Path

import pytest

from bge_rerank_integrations.batching.timeouts import wait
from bge_rerank_integrations.errors import RequestTimeoutError
from bge_rerank_integrations.runtime.tracebacks import raise_if_of_signal_handler
from tests.support.queues import PATIENCE_S

# Calls `act` when Python begins to import a module.
AT_IMPORT = """
    import _thread, functools, logging, os, signal, sys, time
    from bge_rerank_integrations import BGEReranker, Scorer
    from bge_rerank_integrations.errors import RerankError

    model = sys.argv[1]

    class AtImport:
        def __init__(self, name, act):
            self.name, self.act = name, act
            sys.meta_path.insert(0, self)

        def find_spec(self, name, path=None, target=None):
            if name == self.name:
                sys.meta_path.remove(self)
                self.act()

    class JobTimeout(TimeoutError):
        pass

    def end_job(*_):
        raise JobTimeout

    class EndJob:
        def __call__(self, *_):
            raise JobTimeout

        def end(self, *_):
            raise JobTimeout

    class AtLog(logging.Handler):
        def __init__(self, words, act):
            super().__init__()
            self.words, self.act = words, act
            logging.getLogger("bge_rerank_integrations").addHandler(self)
            logging.getLogger("bge_rerank_integrations").setLevel(logging.INFO)

        def emit(self, record):
            if self.words in record.getMessage():
                logging.getLogger("bge_rerank_integrations").removeHandler(self)
                self.act()
"""

CTRL_C_AND_RETRY = """
    AtImport(sys.argv[2], _thread.interrupt_main)
    try:
        Scorer(model, device="cpu")
    except KeyboardInterrupt:
        print("interrupted")
    print(len(Scorer(model, device="cpu").rank("panda", ["a bear", "a panda"])))
"""

NESTED = """
    def load():
        try:
            Scorer(model, device="cpu")
        except Exception as error:
            print(type(error).__name__)

    AtImport("torch.nn", load)
    if sys.argv[2] == "the application":
        import torch
    print(len(Scorer(model, device="cpu").rank("panda", ["a bear", "a panda"])))
"""

AT_THE_END = """
    class Late:
        def __del__(self):
            try:
                Scorer(model, device="cpu")
            except Exception as error:
                print(type(error).__name__)

    late = Late()
"""

CTRL_C_AND_EXIT = """
    AtImport("torch.nn", _thread.interrupt_main)
    Scorer(model, device="cpu")
"""

END_OF_JOB = """
    signal.signal(signal.SIGUSR1, eval(sys.argv[2]))
    AtLog("attention on cpu", lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        Scorer.shared(Scorer(model, device="cpu").config)
    except JobTimeout:
        print("ended")
    print(len(Scorer(model, device="cpu").rank("panda", ["a bear", "a panda"])))
"""

HANDLER_THAT_RANKS = """
    reranker = BGEReranker(model=model, device="cpu")
    AtLog("precision on cpu", lambda: reranker.rerank(["a", "b"], "q"))
    try:
        reranker.rerank(["a", "b"], "q")
    except RerankError as error:
        print(type(error).__name__, "part of loading" in str(error))
    print(len(reranker.rerank(["a", "b"], "q")))
"""


HANDLER_THAT_CLOSES = """
    reranker = BGEReranker(model=model, device="cpu")
    AtLog("precision on cpu", reranker.close)
    try:
        reranker.rerank(["a", "b"], "q")
    except RerankError as error:
        print(type(error).__name__, "part of loading" in str(error))
    print(len(reranker.rerank(["a", "b"], "q")))
    reranker.close()
"""


def run_child(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AT_IMPORT) + textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "module", ["torch.nn", "torch.fx", "transformers.configuration_utils", "safetensors", "numba.core"]
)
def test_after_ctrl_c_during_an_import_the_next_call_loads_the_model(module: str, checkpoint: Path) -> None:
    child = run_child(CTRL_C_AND_RETRY, checkpoint, module)
    assert (child.stdout.split(), child.returncode) == (["interrupted", "2"], 0), child.stderr


def test_a_process_that_ends_after_ctrl_c_during_an_import_does_not_abort(checkpoint: Path) -> None:
    child = run_child(CTRL_C_AND_EXIT, checkpoint)
    assert child.returncode == -signal.SIGINT
    assert child.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in child.stderr


@pytest.mark.parametrize("importer", ["the application", "this package"])
def test_a_load_within_the_import_of_torch_fails_alone(importer: str, checkpoint: Path) -> None:
    child = run_child(NESTED, checkpoint, importer)
    assert (child.stdout.split()[1:], child.returncode) == (["2"], 0), child.stderr


def test_a_load_while_the_interpreter_ends_fails(checkpoint: Path) -> None:
    child = run_child(AT_THE_END, checkpoint)
    assert (len(child.stdout.split()), child.returncode) == (1, 0), child.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize(
    "handler",
    ["end_job", "functools.partial(end_job, 1)", "EndJob()", "EndJob().end", "lambda *_: end_job()"],
)
def test_an_exception_of_a_signal_handler_is_not_taken_for_a_broken_kernel(
    handler: str, checkpoint: Path
) -> None:
    child = run_child(END_OF_JOB, checkpoint, handler)
    assert (child.stdout.split(), child.returncode) == (["ended", "2"], 0), child.stderr
    assert "is not used" not in child.stderr


@pytest.mark.parametrize("code", [HANDLER_THAT_RANKS, HANDLER_THAT_CLOSES])
def test_a_call_in_a_logging_handler_of_its_own_loading_is_refused(code: str, checkpoint: Path) -> None:
    child = run_child(code, checkpoint)
    assert (child.stdout.split(), child.returncode) == (["RerankError", "True", "2"], 0), child.stderr


def test_an_error_within_enum_is_of_no_signal_handler() -> None:
    """`SIG_DFL` and `SIG_IGN` are members of an enum, and `EnumType.__call__` is Python code."""
    with pytest.raises(ValueError, match="99") as caught:
        signal.Handlers(99)
    raise_if_of_signal_handler(caught.value)


class JobTimeoutError(TimeoutError):
    """What a job runner raises in a signal handler."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.parametrize("timeout", [None, PATIENCE_S])
@pytest.mark.parametrize("error", [JobTimeoutError("too long"), TimeoutError("too long")])
def test_a_timeout_of_a_signal_handler_is_kept(timeout: float | None, error: TimeoutError) -> None:
    def stop(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    future: Future[int] = Future()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError, match="too long") as caught:
            wait(future, timeout)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert caught.value is error
    assert future.cancelled()
    with pytest.raises(RequestTimeoutError):
        wait(Future(), 0.01)
