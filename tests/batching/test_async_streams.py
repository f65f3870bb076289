"""Iterators as arguments of async calls: they are read in parts, off the event loop, until the call ends."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.errors import (
    InputTypeError,
    NonFiniteScoreError,
    QueueFullError,
    RequestTimeoutError,
    ScorerClosedError,
)
from bge_rerank_integrations.text.tokenization import EncodedPair, PairTokenizer
from tests.support.queues import PATIENCE_S, wait_until
from tests.support.tolerances import LOGIT_TOLERANCE

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
QUERY = "what does a giant panda eat?"
PART = 64

Pairs = Iterable[tuple[str, str]] | AsyncIterable[tuple[str, str]]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the parts short in which an iterator is read."""
    monkeypatch.setattr("bge_rerank_integrations.scorer._NUM_STREAMED_PAIRS", PART)


class EndsTooSoon:
    """Passages that raise `StopIteration` when they are read."""

    def __iter__(self) -> Iterator[str]:
        raise StopIteration


async def test_input_that_raises_stop_iteration_ends_the_call(scorer: Scorer) -> None:
    requests = cast("Any", iter([(QUERY, EndsTooSoon())]))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(scorer.arank_many(requests), PATIENCE_S)


def pairs(number: int) -> list[tuple[str, str]]:
    return [(QUERY, f"text {index}") for index in range(number)]


def in_a_thread(pairs: Iterable[tuple[str, str]]) -> Pairs:
    return iter(pairs)


def in_the_loop(pairs: Iterable[tuple[str, str]]) -> Pairs:
    async def generate() -> AsyncIterator[tuple[str, str]]:
        for pair in pairs:
            yield pair

    return generate()


KINDS = pytest.mark.parametrize("kind", [in_a_thread, in_the_loop])


@KINDS
@pytest.mark.parametrize("number", [0, 1, PART, PART + 1, 5 * PART - 1])
async def test_an_iterator_gives_the_scores_of_a_list(
    kind: Callable[[Iterable[tuple[str, str]]], Pairs], number: int, scorer: Scorer
) -> None:
    scores = await scorer.ascore(kind(pairs(number)))
    assert scores == pytest.approx(scorer.score(pairs(number)), abs=TOLERANCE)
    assert {type(score) for score in scores} <= {float}


@KINDS
async def test_no_more_than_two_parts_are_read_ahead_of_the_scores(
    kind: Callable[[Iterable[tuple[str, str]]], Pairs], scorer: Scorer
) -> None:
    scored_before = scorer.stats().pairs
    ahead: list[int] = []

    def generate() -> Iterator[tuple[str, str]]:
        for index in range(10 * PART):
            ahead.append(index - (scorer.stats().pairs - scored_before))
            yield QUERY, f"part {index // PART} text {index}"

    assert len(await scorer.ascore(kind(generate()))) == 10 * PART
    assert max(ahead) < 3 * PART


async def test_an_iterator_may_wait_for_the_event_loop(scorer: Scorer) -> None:
    """It may also wait for other calls of the scorer, even for more calls than tokenizing threads."""
    loop = asyncio.get_running_loop()

    def generate(number: int) -> Iterator[tuple[str, str]]:
        for index in range(3):
            asked = asyncio.run_coroutine_threadsafe(scorer.ascore([(QUERY, f"{number} {index}")]), loop)
            yield QUERY, f"{asked.result(PATIENCE_S)}"

    scores = await asyncio.wait_for(
        asyncio.gather(*(scorer.ascore(generate(number)) for number in range(8))), PATIENCE_S
    )
    assert [len(each) for each in scores] == [3] * 8


async def test_a_slow_iterator_of_requests_leaves_the_loop_free(scorer: Scorer) -> None:
    reading, ticked = threading.Event(), threading.Event()

    def generate() -> Iterator[tuple[str, list[str]]]:
        reading.set()
        assert ticked.wait(PATIENCE_S), "the loop was blocked"
        yield QUERY, ["a", "b"]
        yield "another", ["c"]

    task = asyncio.create_task(scorer.arank_many(generate()))
    assert await asyncio.to_thread(reading.wait, PATIENCE_S)
    ticked.set()
    assert [len(ranking) for ranking in await task] == [2, 1]


@KINDS
async def test_a_malformed_pair_ends_the_call_with_its_index(
    kind: Callable[[Iterable[tuple[str, str]]], Pairs], scorer: Scorer
) -> None:
    bad = [*pairs(PART + 5), (QUERY, 3)]
    with pytest.raises(InputTypeError, match=f"pair {PART + 5} must be") as caught:
        await scorer.ascore(kind(bad))  # type: ignore[arg-type]
    assert caught.value.index == PART + 5


@KINDS
async def test_a_score_that_is_not_finite_has_its_index_in_the_stream(
    kind: Callable[[Iterable[tuple[str, str]]], Pairs], checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (pair,) = PairTokenizer(folder / "tokenizer.json", ScorerConfig()).encode([""], ["panda"])
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["roberta.embeddings.word_embeddings.weight"][int(pair.windows[0][3])] = (
        3e38  # this logit overflows
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bad = [("a", "panda" if number == PART + 7 else "b") for number in range(3 * PART)]
    with Scorer(folder, device="cpu", dtype="float32") as broken:
        with pytest.raises(NonFiniteScoreError, match=f"pair {PART + 7} ") as caught:
            await broken.ascore(kind(bad))
        assert caught.value.index == PART + 7
        wait_until(lambda: not reading_threads())  # although the exception still refers to the call


@KINDS
async def test_errors_of_the_iterator_reach_the_caller(
    kind: Callable[[Iterable[tuple[str, str]]], Pairs], scorer: Scorer
) -> None:
    def generate() -> Iterator[tuple[str, str]]:
        yield from pairs(PART + 1)
        raise TimeoutError("the iterator's own")

    for timeout in (None, PATIENCE_S):
        with pytest.raises(TimeoutError, match="the iterator's own"):
            await scorer.ascore(kind(generate()), timeout=timeout)


async def test_a_timeout_ends_a_call_whose_iterator_hangs(scorer: Scorer) -> None:
    release = threading.Event()

    def hang() -> Iterator[tuple[str, str]]:
        yield from pairs(PART + 1)
        release.wait(PATIENCE_S)

    async def ahang() -> AsyncIterator[tuple[str, str]]:
        for pair in pairs(PART + 1):
            yield pair
        await asyncio.Event().wait()

    for stream in (hang(), ahang()):
        with pytest.raises(RequestTimeoutError):
            await scorer.ascore(stream, timeout=0.2)
    release.set()
    wait_until(lambda: not reading_threads())
    wait_until(lambda: scorer.health().queued_tokens == 0)


async def test_cancellation_stops_the_reading(scorer: Scorer) -> None:
    num_read, reading, cancelled = 0, threading.Event(), threading.Event()

    def generate() -> Iterator[tuple[str, str]]:
        nonlocal num_read
        for pair in pairs(100 * PART):
            if num_read == 2 * PART:
                reading.set()
                cancelled.wait(PATIENCE_S)
            num_read += 1
            yield pair

    task = asyncio.create_task(scorer.ascore(generate()))
    assert await asyncio.to_thread(reading.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cancelled.set()
    wait_until(lambda: not reading_threads())
    assert num_read == 3 * PART, "the part that was being read"
    wait_until(lambda: scorer.health().queued_tokens == 0)


async def test_a_closed_scorer_reads_nothing(checkpoint: Path) -> None:
    scorer = Scorer(checkpoint, device="cpu", dtype="float32")
    scorer.close()

    def generate() -> Iterator[tuple[str, str]]:
        raise AssertionError("read")
        yield QUERY, "text"

    with pytest.raises(ScorerClosedError):
        await scorer.ascore(generate())


async def test_an_iterator_waits_for_its_own_pairs_if_the_queue_is_full(checkpoint: Path) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_queued_tokens=30 * PART) as scorer:
        scores = await scorer.ascore(iter(pairs(4 * PART)))
        assert len(scores) == 4 * PART


@KINDS
async def test_an_iterator_whose_first_part_can_never_fit_the_queue_is_refused(
    kind: Callable[[Iterable[tuple[str, str]]], Pairs], checkpoint: Path
) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_queued_tokens=5 * PART) as scorer:
        with pytest.raises(QueueFullError):
            await scorer.ascore(kind(pairs(2 * PART)))
        assert (scorer.health().queued_requests, scorer.health().queued_tokens) == (0, 0)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("bge-rerank-read")]


@pytest.mark.parametrize(
    "timeout",
    [
        None,
        pytest.param(
            600.0, marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="reads in a task of its own")
        ),
    ],
)
async def test_an_asynchronous_iterator_is_read_in_the_callers_task(
    timeout: float | None, scorer: Scorer
) -> None:
    tasks = {asyncio.current_task()}

    async def generate() -> AsyncIterator[tuple[str, str]]:
        for pair in pairs(2 * PART):
            tasks.add(asyncio.current_task())
            yield pair

    await scorer.ascore(generate(), timeout=timeout)
    assert len(tasks) == 1


async def test_reading_requests_counts_towards_the_timeout(scorer: Scorer) -> None:
    may_end = threading.Event()

    def generate() -> Iterator[tuple[str, list[str]]]:
        may_end.wait(PATIENCE_S)
        yield QUERY, ["a", "b"]

    with pytest.raises(RequestTimeoutError):
        await scorer.arank_many(generate(), timeout=0.05)
    may_end.set()


def test_reading_requests_counts_towards_the_timeout_of_a_thread(scorer: Scorer) -> None:
    def generate() -> Iterator[tuple[str, list[str]]]:
        time.sleep(0.1)
        yield QUERY, ["a", "b"]

    with pytest.raises(RequestTimeoutError):
        scorer.rank_many(generate(), timeout=0.05)


class HeldTokenizer:
    """A tokenizer that waits before it encodes."""

    def __init__(self, tokenizer: PairTokenizer, may_encode: threading.Event) -> None:
        self._tokenizer = tokenizer
        self._may_encode = may_encode
        self.is_waiting = threading.Event()

    def stream(self, *args: Any) -> Iterator[list[EncodedPair]]:
        self.is_waiting.set()
        assert self._may_encode.wait(PATIENCE_S)
        return self._tokenizer.stream(*args)


async def test_close_waits_for_tokenizing_no_longer_than_its_timeout(checkpoint: Path) -> None:
    scorer = Scorer(checkpoint, device="cpu", dtype="float32")
    pipeline, may_encode = scorer._pipeline, threading.Event()
    assert pipeline is not None
    held = HeldTokenizer(pipeline.tokenizer, may_encode)
    pipeline.tokenizer = cast("PairTokenizer", held)
    task = asyncio.create_task(scorer.ascore(pairs(3)))
    assert await asyncio.to_thread(held.is_waiting.wait, PATIENCE_S)
    closing = asyncio.create_task(asyncio.to_thread(scorer.close, 0.05))
    done, _ = await asyncio.wait({closing}, timeout=PATIENCE_S / 2)  # the tokenizer still waits
    may_encode.set()
    assert done
    with pytest.raises(ScorerClosedError):
        await task


@pytest.mark.parametrize("call", ["ascore(pairs())", "arank_many(pairs(), timeout=0.1)"])
def test_a_process_ends_although_an_iterator_does_not(call: str) -> None:
    code = f"""
        import asyncio, threading
        from bge_rerank_integrations import Scorer
        from bge_rerank_integrations.errors import RequestTimeoutError

        reading = threading.Event()

        def pairs():
            reading.set()
            threading.Event().wait()
            yield

        async def main():
            task = asyncio.create_task(Scorer("embedded", device="cpu").{call})
            await asyncio.to_thread(reading.wait)
            if "timeout" in {call!r}:
                await asyncio.wait([task])
                assert isinstance(task.exception(), RequestTimeoutError)

        asyncio.run(main())
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
