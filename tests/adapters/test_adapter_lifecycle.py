"""The life of an adapter: warm-up, close, timeouts, copies, and objects that replace a scorer."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
from pydantic import AliasChoices, Field, ValidationError, model_validator
from typing_extensions import Self

from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, RankedPassage, Scorer
from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.errors import CheckpointNotFoundError, RequestTimeoutError, ScorerClosedError
from tests.support.adapters import ADAPTER_TYPES, QUERY, arank_with, rank_with
from tests.support.queues import PATIENCE_S
from tests.support.scorers import TableScorer

TEXTS = ["bamboo", "a bear", "tea"]

ADAPTERS = pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Return options for a checkpoint that is not loaded yet. Its scorer is closed after the test."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    options: dict[str, Any] = {"model": folder, "device": "cpu", "dtype": "float32"}
    yield options
    Scorer.shared(RerankOptions(**options).scorer_config()).close()


def state_of(scorer: object) -> str:
    assert isinstance(scorer, Scorer)
    return scorer.health().state


def loaded(adapter: RerankOptions) -> Scorer:
    scorer = adapter.resolve_scorer()
    assert isinstance(scorer, Scorer)
    return scorer


# --- warming up --------------------------------------------------------------------------------------


@ADAPTERS
async def test_warming_up_loads_the_model_that_calls_use(
    adapter_type: Callable[..., RerankOptions], options: dict[str, Any]
) -> None:
    adapter = adapter_type(**options)
    await adapter.awarmup()
    num_pairs = loaded(adapter).stats().pairs
    assert num_pairs > 0
    adapter.warmup()
    assert loaded(adapter).stats().pairs > num_pairs


@ADAPTERS
async def test_warming_up_reports_a_model_that_is_not_there(
    adapter_type: Callable[..., RerankOptions], tmp_path: Path
) -> None:
    adapter = adapter_type(model=tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError):
        adapter.warmup()
    with pytest.raises(CheckpointNotFoundError):
        await adapter.awarmup()


@ADAPTERS
async def test_warming_up_stays_off_the_event_loop(
    adapter_type: Callable[..., RerankOptions], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(Scorer, "warmup", lambda _: threads.append(threading.current_thread()))
    await adapter_type(**options).awarmup()
    (thread,) = threads
    assert thread is not threading.current_thread()


@ADAPTERS
async def test_warming_up_leaves_a_scorer_of_another_kind_alone(
    adapter_type: Callable[..., RerankOptions],
) -> None:
    scorer = TableScorer()
    adapter = adapter_type(scorer=scorer)
    adapter.warmup()
    await adapter.awarmup()
    adapter.close()
    assert scorer.asked == []
    assert len(rank_with(adapter, TEXTS)) == 3


# --- closing -----------------------------------------------------------------------------------------


@ADAPTERS
def test_closing_releases_the_model_and_the_next_call_loads_it_again(
    adapter_type: Callable[..., RerankOptions], options: dict[str, Any]
) -> None:
    adapter = adapter_type(**options)
    before = rank_with(adapter, TEXTS)
    scorer = loaded(adapter)
    adapter.close()
    adapter.close()
    assert state_of(scorer) == "closed"
    assert [index for index, _ in rank_with(adapter, TEXTS)] == [index for index, _ in before]
    assert loaded(adapter) is not scorer


@ADAPTERS
def test_an_adapter_that_never_scored_closes_nothing(
    adapter_type: Callable[..., RerankOptions], options: dict[str, Any]
) -> None:
    user, idle = adapter_type(**options), adapter_type(**options)
    scorer = loaded(user)
    idle.close()
    assert state_of(scorer) != "closed"


async def test_the_last_of_several_closes_the_model(options: dict[str, Any]) -> None:
    """The adapters belong to both frameworks and load the model in different ways."""
    first, second, third = BGEReranker(**options), BGERerankPostprocessor(**options), BGEReranker(**options)
    scorer = loaded(first)
    assert await second.aresolve_scorer() is scorer
    await arank_with(third, TEXTS)
    for adapter in (first, second):
        adapter.close()
        assert state_of(scorer) != "closed"
    assert len(rank_with(third, TEXTS)) == 3
    third.close()
    assert state_of(scorer) == "closed"


def test_a_deleted_adapter_does_not_keep_the_model(options: dict[str, Any]) -> None:
    first, second = BGEReranker(**options), BGEReranker(**options)
    scorer = loaded(first)
    assert loaded(second) is scorer
    del second
    gc.collect()
    first.close()
    assert state_of(scorer) == "closed"


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "model_copy"])
def test_a_copy_of_an_adapter_keeps_the_model(copier: str, options: dict[str, Any]) -> None:
    original = BGEReranker(**options)
    scorer = loaded(original)
    copiers: dict[str, Callable[[], BGEReranker]] = {
        "pickle": lambda: pickle.loads(pickle.dumps(original)),
        "deepcopy": lambda: copy.deepcopy(original),
        "model_copy": original.model_copy,
    }
    copied = copiers[copier]()
    assert loaded(copied) is scorer
    original.close()
    assert state_of(scorer) != "closed"
    copied.close()
    assert state_of(scorer) == "closed"


def test_a_scorer_shared_without_a_holder_stays_open(options: dict[str, Any]) -> None:
    adapter = BGEReranker(**options)
    scorer = Scorer.shared(adapter.scorer_config())
    assert loaded(adapter) is scorer
    adapter.close()
    assert state_of(scorer) != "closed"
    assert scorer.score([("a", "b")])


@ADAPTERS
def test_a_scorer_of_ones_own_stays_open(adapter_type: Callable[..., RerankOptions], scorer: Scorer) -> None:
    adapter = adapter_type(scorer=scorer)
    rank_with(adapter, TEXTS)
    adapter.close()
    assert state_of(scorer) != "closed"


def test_close_also_closes_models_of_earlier_settings(options: dict[str, Any]) -> None:
    adapter = BGEReranker(**options)
    scorers = [loaded(adapter)]
    adapter.max_length = 256
    scorers.append(loaded(adapter))
    assert scorers[0] is not scorers[1]
    adapter.close()
    assert [state_of(scorer) for scorer in scorers] == ["closed"] * 2


def test_closing_one_adapter_while_another_loads_breaks_neither(options: dict[str, Any]) -> None:
    """With any timing of the threads, each call gets its scores, or an error if its own adapter was closed."""
    barrier = threading.Barrier(8)

    def use(number: int) -> int:
        adapter = ADAPTER_TYPES[number % 2](**options)
        barrier.wait(PATIENCE_S)
        num_ranked = 0
        for _ in range(5):
            num_ranked += len(rank_with(adapter, TEXTS))
            adapter.close()
        return num_ranked

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [15] * 8


def test_closing_waits_for_a_model_that_is_loading(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    from_config = Scorer.from_config

    def load_slowly(config: Any) -> Scorer:
        loading.set()
        assert go_on.wait(PATIENCE_S)
        return from_config(config)

    monkeypatch.setattr(Scorer, "from_config", load_slowly)
    adapter = BGEReranker(**options)
    with ThreadPoolExecutor(2) as pool:
        resolved = pool.submit(adapter.resolve_scorer)
        assert loading.wait(PATIENCE_S)
        closed = pool.submit(adapter.close)
        go_on.set()
        closed.result(PATIENCE_S)
        assert state_of(resolved.result(PATIENCE_S)) == "closed"


def test_closing_where_loading_failed_is_no_error(tmp_path: Path) -> None:
    adapter = BGEReranker(model=tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError):
        adapter.resolve_scorer()
    adapter.close()


# --- timeouts ----------------------------------------------------------------------------------------


@ADAPTERS
@pytest.mark.parametrize("own", [True, False])
async def test_a_call_that_takes_too_long_ends(
    adapter_type: Callable[..., RerankOptions], own: bool, options: dict[str, Any], scorer: Scorer
) -> None:
    given: dict[str, Any] = {"scorer": scorer} if own else options
    adapter = adapter_type(**given, timeout=0)
    texts = [f"text {number}" for number in range(200)]
    with pytest.raises(RequestTimeoutError):
        rank_with(adapter, texts)
    with pytest.raises(RequestTimeoutError):
        await arank_with(adapter, texts)
    patient = adapter.model_copy(update={"timeout": PATIENCE_S})
    assert len(rank_with(patient, texts)) == len(await arank_with(patient, texts)) == 200


async def test_the_timeout_holds_for_every_way_to_rank(scorer: Scorer) -> None:
    reranker = BGEReranker(scorer=scorer, timeout=0)
    texts = [f"text {number}" for number in range(200)]
    for call in (
        lambda: reranker.rerank(texts, QUERY),
        lambda: reranker.rerank_many([(QUERY, texts)]),
        lambda: reranker.as_cross_encoder().score([(QUERY, text) for text in texts]),
    ):
        with pytest.raises(RequestTimeoutError):
            call()
    with pytest.raises(RequestTimeoutError):
        await reranker.arerank(texts, QUERY)
    with pytest.raises(RequestTimeoutError):
        await reranker.arerank_many([(QUERY, texts)])


@ADAPTERS
@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "3", True])
def test_a_timeout_is_a_number_of_seconds(adapter_type: Callable[..., RerankOptions], bad: Any) -> None:
    with pytest.raises(ValidationError, match="timeout"):
        adapter_type(timeout=bad)


@ADAPTERS
def test_a_scorer_of_another_kind_limits_its_time_itself(adapter_type: Callable[..., RerankOptions]) -> None:
    with pytest.raises(ValidationError, match="timeout cannot be combined with a scorer"):
        adapter_type(scorer=TableScorer(), timeout=1.0)


# --- copies with other options -----------------------------------------------------------------------


@ADAPTERS
@pytest.mark.parametrize(
    "update",
    [
        {"topn": 3},
        {"top_n": -1},
        {"top_n": "3"},
        {"max_length": 3},
        {"device": "cpu", "devices": ["cpu"]},
        {"scorer": "TEXT-CANARY"},
        {"scorer": TableScorer(), "model": "other"},
    ],
    ids=str,
)
def test_a_copy_with_invalid_options_is_refused(
    adapter_type: Callable[..., RerankOptions], update: dict[str, Any]
) -> None:
    adapter = adapter_type(top_n=2)
    with pytest.raises(ValidationError) as caught:
        adapter.model_copy(update=update)
    assert any(name in str(caught.value) for name in update)
    assert "CANARY" not in str(caught.value)
    assert adapter.top_n == 2


@ADAPTERS
@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_has_the_updated_options_and_keeps_the_others(
    adapter_type: Callable[..., RerankOptions], deep: bool, scorer: Scorer
) -> None:
    adapter = adapter_type(scorer=scorer, top_n=2)
    before = adapter.model_dump()
    copied = adapter.model_copy(update={"top_n": 1, "score_threshold": 0.25}, deep=deep)
    assert type(copied) is adapter_type
    assert (copied.top_n, copied.score_threshold, copied.scorer) == (1, 0.25, scorer)
    assert copied.model_fields_set == adapter.model_fields_set | {"score_threshold"}
    assert adapter.model_dump() == before
    plain = adapter_type().model_copy(update={"devices": ["cuda:0", "cuda:1"], "model": Path("a")}, deep=deep)
    assert (plain.devices, plain.model) == (("cuda:0", "cuda:1"), "a")


@ADAPTERS
def test_a_subclass_with_an_init_of_its_own_can_be_copied(adapter_type: type[RerankOptions]) -> None:
    class Best(adapter_type):  # type: ignore[valid-type,misc]
        number: int = Field(default=1, alias="n")
        other_number: int = Field(default=1, validation_alias=AliasChoices("m", "o"))

        def __init__(self, best: int) -> None:
            super().__init__(model="embedded", top_n=best, n=2)

        @model_validator(mode="after")
        def _limit(self) -> Self:
            self.__dict__["top_n"] = min(self.top_n or 0, 10)
            return self

        @cached_property
        def twice(self) -> int:
            return 2 * int(self.top_n or 0)

    best = Best(3)
    assert best.twice == 6
    copied = best.model_copy(update={"top_n": 1})
    assert (copied.top_n, copied.number, copied.twice, best.twice) == (1, 2, 2, 6)
    assert best.model_copy(update={"number": 5, "other_number": 6}).number == 5
    assert best.model_copy(update={"top_n": 50}).top_n == 10
    best.top_n = 20
    assert (best.top_n, best.twice) == (10, 20)
    best.top_n = 3
    assert best.model_copy().top_n == 3
    for update in ({"top_n": -1}, {"twice": 1}, {"other": 1}, {"n": 1}):
        with pytest.raises(ValidationError, match=next(iter(update))):
            best.model_copy(update=update)


class Chosen(BGERerankPostprocessor):
    """A subclass with an `__init__` that does not take the options."""

    def __init__(self, best: int) -> None:
        super().__init__(scorer=TableScorer(), top_n=best)


def test_a_subclass_with_an_init_of_its_own_can_be_pickled() -> None:
    restored = pickle.loads(pickle.dumps(Chosen(1)))
    assert type(restored) is Chosen
    assert len(rank_with(restored, TEXTS)) == 1
    assert len(rank_with(restored.model_copy(update={"top_n": 2}), TEXTS)) == 2


def test_a_copy_keeps_its_callback_manager() -> None:
    postprocessor = BGERerankPostprocessor()
    assert postprocessor.model_copy(update={"top_n": 1}).callback_manager is postprocessor.callback_manager


# --- stand-ins for a scorer --------------------------------------------------------------------------


@ADAPTERS
@pytest.mark.parametrize("make", [lambda: Mock(spec=Scorer), lambda: create_autospec(Scorer, instance=True)])
async def test_a_mock_of_a_scorer_works_as_one(
    adapter_type: Callable[..., RerankOptions], make: Callable[[], Any]
) -> None:
    mock = make()
    ranked: Sequence[RankedPassage] = [RankedPassage(1, 0.75), RankedPassage(0, 0.5)]
    mock.rank.return_value = mock.arank.return_value = ranked
    adapter = adapter_type(scorer=mock, top_n=2, score_threshold=0.25, timeout=3.0)
    assert rank_with(adapter, TEXTS) == [(1, 0.75), (0, 0.5)]
    assert await arank_with(adapter, TEXTS) == [(1, 0.75), (0, 0.5)]
    mock.rank.assert_called_once_with(QUERY, TEXTS, 2, 0.25, timeout=3.0, normalize=True)
    mock.arank.assert_awaited_once_with(QUERY, TEXTS, 2, 0.25, timeout=3.0, normalize=True)
    repr(adapter)
    adapter.model_dump_json()
    adapter.warmup()
    mock.warmup.assert_called_once_with()


async def test_a_mock_of_a_scorer_ranks_many(scorer: Scorer) -> None:
    mock = Mock(spec=Scorer)
    mock.rank_many.return_value = mock.arank_many.return_value = [[RankedPassage(0, 0.5)]]
    reranker = BGEReranker(scorer=mock)
    expected = [[{"index": 0, "relevance_score": 0.5}]]
    assert reranker.rerank_many([(QUERY, ["a"])]) == expected
    assert await reranker.arerank_many([(QUERY, ["a"])]) == expected


async def test_a_closed_scorer_of_ones_own_raises(checkpoint: Path) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32") as scorer:
        adapter = BGEReranker(scorer=scorer)
    with pytest.raises(ScorerClosedError):
        rank_with(adapter, TEXTS)
    with pytest.raises(ScorerClosedError):
        await asyncio.wait_for(arank_with(adapter, TEXTS), PATIENCE_S)
