"""The errors and repetitions of `ServeScorer`, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra `ray`")

from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from bge_rerank_integrations import divided_calls
from bge_rerank_integrations.errors import (
    ConfigError,
    InputError,
    NonFiniteScoreError,
    QueueFullError,
    RemoteError,
    RequestTimeoutError,
    RerankError,
    ServerUnreachableError,
    WorkerDiedError,
)
from bge_rerank_integrations.ranking import RankedPassage, Ranking
from bge_rerank_integrations.ray import ServeScorer

CANARY = "CANARY"


class Response:
    """A response that gives an outcome."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.is_cancelled = False

    def result(self, timeout_s: float | None = None) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def __await__(self) -> Generator[Any, None, Any]:
        if self.outcome == "never":
            yield from asyncio.sleep(60).__await__()
        return self.result()

    def cancel(self) -> None:
        self.is_cancelled = True


class Stub(ServeScorer):
    """Answers calls with given outcomes, and then with rankings whose scores are all 0."""

    def __init__(self, *outcomes: Any, **options: Any) -> None:
        super().__init__(DeploymentHandle("Reranker", "rerank"), **options)
        self.outcomes = list(outcomes)
        self.responses: list[Response] = []

    def _send(self, call: Any) -> Any:
        ranked = [
            Ranking([RankedPassage(index, 0.0) for index in range(len(passages))])
            for _, passages in call.part.requests
        ]
        self.responses.append(Response(self.outcomes.pop(0) if self.outcomes else ranked))
        return self.responses[-1]


@pytest.fixture
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divided_calls, "_FIRST_DELAY_S", 0.001)


def raised_by_replica(error: Exception) -> RayTaskError:
    return RayTaskError("rank", CANARY, error)


@pytest.mark.usefixtures("_short_delays")
@pytest.mark.parametrize(
    "failure",
    [
        ActorDiedError(),
        BackPressureError(1, 1),
        RayServeException(CANARY),
        raised_by_replica(QueueFullError("full")),
        raised_by_replica(ServerUnreachableError("shutting down")),
        raised_by_replica(WorkerDiedError("dead")),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_what_may_pass_is_tried_again(failure: Exception) -> None:
    stub = Stub(failure, failure, max_retries=2)
    assert stub.rank("a", ["b"]) == [RankedPassage(0, 0.0)]
    assert len(stub.responses) == 3
    stub = Stub(failure, failure, max_retries=2)
    assert asyncio.run(stub.arank("a", ["b"])) == [RankedPassage(0, 0.0)]
    stub = Stub(failure, failure, failure, max_retries=1)
    with pytest.raises(RerankError) as caught:
        stub.rank("a", ["b"])
    assert len(stub.responses) == 2
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (raised_by_replica(InputError("wrong", index=3)), InputError),
        (raised_by_replica(RequestTimeoutError("late")), RequestTimeoutError),
        (raised_by_replica(ValueError(CANARY)), RemoteError),
        (raised_by_replica(RayServeException(CANARY)), RemoteError),
        (RayError(CANARY), RemoteError),
        (TimeoutError(CANARY), RequestTimeoutError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_will_not_pass_is_an_error_at_once(failure: Exception, kind: type[RerankError]) -> None:
    stub = Stub(failure)
    with pytest.raises(kind) as caught:
        stub.rank("a", ["b"])
    assert type(caught.value) is kind
    assert CANARY not in str(caught.value)
    assert len(stub.responses) == 1


def test_a_synchronous_call_in_an_event_loop_is_refused_before_it_is_sent() -> None:
    """Ray refuses it only after it has sent the call, with an error of its own."""
    stub = Stub()

    async def call() -> None:
        with pytest.raises(RerankError, match="use arank, arank_many or ascore"):
            stub.rank("a", ["b"])
        assert await stub.arank("a", ["b"]) == [RankedPassage(0, 0.0)]

    asyncio.run(call())
    assert len(stub.responses) == 1


def test_a_deleted_application_is_named() -> None:
    stub = Stub(DeploymentUnavailableError(DeploymentID("a", "b")), max_retries=0)
    with pytest.raises(ServerUnreachableError, match="the application has failed or was deleted"):
        stub.rank("a", ["b"])


def test_an_index_counts_over_all_calls() -> None:
    good = [Ranking([RankedPassage(index, 0.0) for index in range(1024)])]
    failure = raised_by_replica(NonFiniteScoreError("not finite", index=3))
    with pytest.raises(NonFiniteScoreError, match="pair 1027") as caught:
        Stub(good, failure).score([("q", "p")] * 2000)
    assert caught.value.index == 1027


def test_a_refused_passage_has_the_index_of_the_undivided_call() -> None:
    good = [Ranking([RankedPassage(index, 0.0) for index in range(1024)])]
    failure = raised_by_replica(InputError("passage 3 is blank", index=3))
    with pytest.raises(InputError, match=r"^passage 1027 is blank") as caught:
        Stub(good, failure).rank("q", ["p"] * 2000)
    assert caught.value.index == 1027
    with pytest.raises(InputError, match=r"^request 1: passage 3 is blank") as caught:
        Stub(good, failure).rank_many([("q", ["p"] * 1024), ("q", ["p"] * 10)])
    assert caught.value.index == 1


def test_a_cancelled_call_is_cancelled_on_the_replica() -> None:
    async def cancel() -> Stub:
        stub = Stub("never")
        task = asyncio.ensure_future(stub.arank("a", ["b"]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stub

    assert asyncio.run(cancel()).responses[0].is_cancelled
    stub = Stub("never")
    with pytest.raises(RequestTimeoutError):
        asyncio.run(stub.arank("a", ["b"], timeout=0.01))
    assert stub.responses[0].is_cancelled
    stub = Stub(TimeoutError())
    with pytest.raises(RequestTimeoutError):
        stub.rank("a", ["b"])
    assert stub.responses[0].is_cancelled


def test_iterators_are_read_by_async_calls() -> None:
    requests = (("q", ["p"] * number) for number in (3, 0, 1))
    stub = Stub(normalize=True)
    first, second, third = asyncio.run(stub.arank_many(requests, top_n=2))
    assert [(passage.index, passage.score) for passage in first] == [(0, 0.5), (1, 0.5)]
    assert (second, [passage.index for passage in third]) == ([], [0])
    with pytest.raises(InputError, match="top_n"):
        asyncio.run(stub.arank_many([], top_n=-1))
    assert asyncio.run(stub.ascore(("q", "p") for _ in range(3))) == [0.5, 0.5, 0.5]


def test_an_interrupted_call_is_cancelled_on_the_replica() -> None:
    stub = Stub(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        stub.rank("a", ["b"])
    assert stub.responses[0].is_cancelled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"normalize": 1}, "normalize"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stub(**options)
    with pytest.raises(ConfigError, match="handle must be a DeploymentHandle, not str"):
        ServeScorer("rerank")  # type: ignore[arg-type]
