"""The common behaviour of the two adapters: options, model, order, scores, threads and event loops."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import inspect
import json
import logging
import pickle
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import ValidationError, field_validator
from pydantic_core import PydanticUndefined

from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, Scorer, ScorerConfig
from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.errors import (
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    InputTypeError,
)
from tests.support.adapters import (
    ADAPTER_TYPES,
    QUERY,
    Ranked,
    arank_with,
    langchain_documents,
    llama_index_nodes,
    rank_with,
    ranked_documents,
    ranked_nodes,
)
from tests.support.queues import PATIENCE_S
from tests.support.scorers import TableScorer
from tests.support.tolerances import LOGIT_TOLERANCE

T = TypeVar("T")

TIBETAN_OM = "\u0f00"  # unknown to the small tokenizer, so that a long sequence of it is one token
TOLERANCE = LOGIT_TOLERANCE[torch.float32]
CONFIG_FIELDS = {field.name: field.default for field in dataclasses.fields(ScorerConfig)}


class ForbiddenPool(ThreadPoolExecutor):
    """A default executor of an event loop that fails when it is used."""

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        raise AssertionError("the event loop's default pool was used")


class Adapter(Protocol):
    """An adapter of either framework behind one signature: from texts to (position, score), best first."""

    def __call__(self, query: Any, texts: Sequence[Any], **options: Any) -> Awaitable[list[Ranked]]: ...


async def langchain_sync(query: Any, texts: Sequence[str], **options: Any) -> list[Ranked]:
    documents = langchain_documents(texts)
    return ranked_documents(BGEReranker(**options).compress_documents(documents, query))


async def langchain_async(query: Any, texts: Sequence[str], **options: Any) -> list[Ranked]:
    documents = langchain_documents(texts)
    return ranked_documents(await BGEReranker(**options).acompress_documents(documents, query))


async def llama_index_sync(query: Any, texts: Sequence[str], **options: Any) -> list[Ranked]:
    nodes = llama_index_nodes(texts)
    return ranked_nodes(BGERerankPostprocessor(**options).postprocess_nodes(nodes, query_str=query))


async def llama_index_async(query: Any, texts: Sequence[str], **options: Any) -> list[Ranked]:
    nodes = llama_index_nodes(texts)
    return ranked_nodes(await BGERerankPostprocessor(**options).apostprocess_nodes(nodes, query_str=query))


def assert_same(ranked: Sequence[Ranked], expected: Sequence[Ranked]) -> None:
    """Compare rankings whose scores come from different batches, and may therefore differ in the last bits."""
    assert len(ranked) == len(expected)
    assert dict(ranked) == pytest.approx(dict(expected), abs=TOLERANCE)
    assert list(ranked) == sorted(ranked, key=lambda each: (-(each[1] or 0.0), each[0]))


class ScorerWithAKey(TableScorer):
    """A scorer whose `repr` contains a secret."""

    def __repr__(self) -> str:
        return "ScorerWithAKey(key='SECRET')"


ADAPTERS: list[Adapter] = [langchain_sync, langchain_async, llama_index_sync, llama_index_async]


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.__name__)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Run a test once for each adapter, sync and async."""
    adapter: Adapter = request.param
    return adapter


@pytest.fixture
def make_fresh_checkpoint(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Return a function that copies a checkpoint, which is then not loaded in this process yet.

    Shared scorers of the copies are closed after the test.
    """
    folders: list[Path] = []

    def make() -> Path:
        folders.append(tmp_path / f"model-{len(folders)}")
        shutil.copytree(checkpoint, folders[-1])
        return folders[-1]

    yield make
    for folder in folders:
        Scorer.shared(RerankOptions(**on_cpu(folder)).scorer_config()).close()


@pytest.fixture
def fresh_checkpoint(make_fresh_checkpoint: Callable[[], Path]) -> Path:
    """Return a checkpoint that is not loaded in this process. Its shared scorer is closed after the test."""
    return make_fresh_checkpoint()


def on_cpu(checkpoint: Path) -> dict[str, Any]:
    return {"model": str(checkpoint), "device": "cpu", "dtype": "float32"}


# --- the same options --------------------------------------------------------------------------------


def shared_options(adapter_type: type[RerankOptions]) -> dict[str, Any]:
    """Return the name and default of each option that both adapters have, in the order of this adapter."""
    fields = adapter_type.model_fields
    return {name: field.default for name, field in fields.items() if name in RerankOptions.model_fields}


def test_both_adapters_have_the_same_options_in_the_same_order_with_the_same_defaults() -> None:
    langchain, llama_index = map(shared_options, ADAPTER_TYPES)
    assert list(langchain.items()) == list(llama_index.items())
    assert PydanticUndefined not in langchain.values()


def test_options_of_one_adapter_only_belong_to_its_framework() -> None:
    names = [
        set(adapter_type.model_fields) - set(RerankOptions.model_fields) for adapter_type in ADAPTER_TYPES
    ]
    assert names == [
        {"score_key", "rank_fields", "document_template"},
        {"metadata_mode", "callback_manager"},
    ]


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_signatures_show_the_same_order(adapter_type: type[RerankOptions]) -> None:
    names = [n for n in inspect.signature(adapter_type).parameters if n in RerankOptions.model_fields]
    assert names == list(RerankOptions.model_fields)


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_options_agree_with_the_config(adapter_type: type[RerankOptions]) -> None:
    """Only the default of `normalize` differs: it is on in the adapters."""
    options = shared_options(adapter_type)
    assert [name for name in options if name in CONFIG_FIELDS and name != "normalize"] == [
        name for name in CONFIG_FIELDS if name != "normalize"
    ]
    assert {n: options[n] for n in CONFIG_FIELDS} == {**CONFIG_FIELDS, "normalize": True}
    assert adapter_type().scorer_config() == ScorerConfig(normalize=True)


def test_scorer_takes_the_options_of_the_config_in_order() -> None:
    parameters = dict(inspect.signature(Scorer).parameters)
    assert [(name, parameter.default) for name, parameter in parameters.items()] == list(
        CONFIG_FIELDS.items()
    )


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
@pytest.mark.parametrize("name", sorted(CONFIG_FIELDS))
def test_every_setting_reaches_the_config(adapter_type: type[RerankOptions], name: str) -> None:
    others: dict[str, Any] = {
        "model": "BAAI/bge-reranker-large",
        "revision": "main",
        "sha256": "0" * 64,
        "cache_folder": "cache",
        "local_files_only": True,
        "device": "cuda:1",
        "devices": ("cuda:0", "cuda:1"),
        "dtype": "bfloat16",
        "max_length": 256,
        "query_max_length": 64,
        "query_truncation_side": "left",
        "max_batch_tokens": 1024,
        "num_threads": 1,
        "capture_graphs": False,
        "max_wait_ms": 2.5,
        "max_queued_tokens": 100_000,
        "normalize": False,
        "query_instruction": "query: ",
        "passage_instruction": "passage: ",
        "long_passages": "windows",
        "window_overlap_tokens": 32,
        "blank_passages": "refuse",
    }
    needed: dict[str, Any] = {"long_passages": "windows"} if name == "window_overlap_tokens" else {}
    assert getattr(adapter_type().scorer_config(), name) != others[name]
    assert getattr(adapter_type(**needed, **{name: others[name]}).scorer_config(), name) == others[name]


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_paths_are_accepted_as_models(adapter_type: Callable[..., RerankOptions], tmp_path: Path) -> None:
    options = adapter_type(model=tmp_path / "model", cache_folder=tmp_path)
    assert (options.model, options.cache_folder) == (str(tmp_path / "model"), str(tmp_path))


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_a_scorer_of_ones_own_is_named_by_its_type_alone(adapter_type: Callable[..., RerankOptions]) -> None:
    """The `repr` of a remote scorer may contain an address or a key."""
    options = adapter_type(scorer=ScorerWithAKey())
    for shown in (repr(options), str(options), options.model_dump_json(), repr(options.model_dump())):
        assert "ScorerWithAKey" in shown
        assert "SECRET" not in shown
        assert "bge-reranker-base" not in shown


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_repr_and_dump_name_the_model_of_a_scorer(
    adapter_type: Callable[..., RerankOptions], scorer: Scorer, checkpoint: Path
) -> None:
    options = adapter_type(scorer=scorer, top_n=3)
    assert repr(scorer) in repr(options)
    assert "top_n=3" in repr(options)
    dump = options.model_dump()
    assert dump["scorer"] == {"give_again": str(checkpoint)}
    assert "model" not in dump
    assert "bge-reranker-base" not in repr(options) + repr(dump)
    plain = adapter_type()
    assert "scorer" not in plain.model_dump()
    assert "scorer" not in repr(plain)


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
@pytest.mark.parametrize("timeout", [None, 60.0])
async def test_a_dump_made_with_a_scorer_refuses_to_score_until_one_is_given(
    adapter_type: type[RerankOptions], scorer: Scorer, checkpoint: Path, timeout: float | None
) -> None:
    options = adapter_type(scorer=scorer, top_n=1, timeout=timeout)
    dump = json.loads(json.dumps(options.model_dump(mode="json")))
    for restored in (
        adapter_type.model_validate(dump),
        adapter_type.model_validate_json(options.model_dump_json()),
        adapter_type.model_validate(adapter_type.model_validate(dump).model_dump()),
        pickle.loads(pickle.dumps(adapter_type.model_validate(dump))),
        copy.deepcopy(adapter_type.model_validate(dump)),
    ):
        assert restored.scorer_name() == str(checkpoint)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"set scorer= again") as caught:
                rank_with(restored, ["a", "b"])
            assert str(checkpoint) in str(caught.value)
            with pytest.raises(ConfigError, match=r"set scorer= again"):
                await arank_with(restored, ["a", "b"])
        expected = rank_with(options, ["a", "b"])
        assert_same(rank_with(restored.model_copy(update={"scorer": scorer}), ["a", "b"]), expected)
        restored.scorer = scorer
        assert_same(rank_with(restored, ["a", "b"]), expected)


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"give_again": 3}, "scorer"),
        ({"give_again": "x", "more": "y"}, "scorer"),
        ({}, "scorer"),
        ("http://127.0.0.1:1", r"scorer is a string; .* RemoteScorer\(url\)"),
        (Scorer, "scorer is the class Scorer; give an instance of it"),
    ],
    ids=str,
)
def test_objects_that_are_no_scorers_are_refused(
    adapter_type: Callable[..., RerankOptions], bad: Any, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        adapter_type(scorer=bad)
    adapter = adapter_type(model="embedded")
    with pytest.raises(ValidationError, match=message):
        adapter.scorer = bad
    assert adapter.scorer is None


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_settings_together_with_a_dumped_scorer_are_refused(
    adapter_type: Callable[..., RerankOptions], scorer: Scorer
) -> None:
    dump = adapter_type(scorer=scorer).model_dump()
    with pytest.raises(ValidationError, match=r"\['max_length'\] cannot be combined with scorer"):
        adapter_type(**dump, max_length=256)


# --- the same model ----------------------------------------------------------------------------------


def test_both_adapters_load_one_model_in_concurrent_calls(fresh_checkpoint: Path) -> None:
    num_threads = 16
    barrier = threading.Barrier(num_threads)

    def resolve(number: int) -> object:
        options = ADAPTER_TYPES[number % 2](**on_cpu(fresh_checkpoint), top_n=number)
        barrier.wait()
        return options.resolve_scorer()

    with ThreadPoolExecutor(num_threads) as pool:
        scorers = list(pool.map(resolve, range(num_threads)))
    assert len(set(map(id, scorers))) == 1


async def test_both_adapters_load_one_model_in_concurrent_async_calls(fresh_checkpoint: Path) -> None:
    options = [ADAPTER_TYPES[number % 2](**on_cpu(fresh_checkpoint)) for number in range(16)]
    scorers = await asyncio.gather(*(each.aresolve_scorer() for each in options))
    assert len(set(map(id, scorers))) == 1
    assert options[0].resolve_scorer() is scorers[0]


def test_other_settings_are_another_model(checkpoint: Path) -> None:
    raw, normalized = (BGEReranker(**on_cpu(checkpoint), normalize=normalize) for normalize in (False, True))
    assert raw.resolve_scorer() is not normalized.resolve_scorer()


async def test_a_closed_model_is_loaded_again(adapter: Adapter, fresh_checkpoint: Path) -> None:
    before = await adapter(QUERY, ["a", "b c"], **on_cpu(fresh_checkpoint))
    Scorer.shared(RerankOptions(**on_cpu(fresh_checkpoint)).scorer_config()).close()
    assert_same(await adapter(QUERY, ["a", "b c"], **on_cpu(fresh_checkpoint)), before)


async def test_a_model_that_is_not_there_is_reported_each_time(adapter: Adapter, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointNotFoundError):
            await adapter(QUERY, ["a"], **on_cpu(tmp_path / "nowhere"))


async def test_nothing_to_rank_needs_no_model(adapter: Adapter, tmp_path: Path) -> None:
    assert await adapter(QUERY, [], **on_cpu(tmp_path / "nowhere")) == []


# --- the same results --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": False}, {"top_n": 7}, {"score_threshold": 0.5}, {"max_length": 32}],
    ids=str,
)
async def test_adapters_agree_with_the_scorer(
    options: dict[str, Any], checkpoint: Path, texts: list[str]
) -> None:
    options = {**on_cpu(checkpoint), **options}
    config = RerankOptions(**options).scorer_config()
    ranking = Scorer.shared(config).rank(QUERY, texts, options.get("top_n"), options.get("score_threshold"))
    expected: list[Ranked] = [(passage.index, passage.score) for passage in ranking]
    assert 0 < len(expected) <= len(texts)
    for adapter in ADAPTERS:
        assert_same(await adapter(QUERY, texts, **options), expected)


async def test_adapters_accept_a_scorer_of_ones_own(adapter: Adapter, scorer: Scorer) -> None:
    texts = ["bamboo", "a bear", "tea", "bamboo"]
    assert not scorer.config.normalize
    for normalize in (True, False):
        ranking = scorer.rank(QUERY, texts, normalize=normalize)
        expected = [(passage.index, passage.score) for passage in ranking]
        assert_same(await adapter(QUERY, texts, scorer=scorer, normalize=normalize), expected)
    assert all(0 < score < 1 for _, score in await adapter(QUERY, texts, scorer=scorer) if score is not None)
    table = TableScorer({"a bear": 0.5, "tea": 0.25})
    assert await adapter(QUERY, texts, scorer=table) == [(1, 0.5), (2, 0.25), (0, 0.0), (3, 0.0)]


@given(
    scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), max_size=12),
    top_n=st.none() | st.integers(0, 14),
    threshold=st.none() | st.sampled_from([0.0, 0.25, 0.6, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_adapters_return_any_ranking_unchanged(
    scores: list[float], top_n: int | None, threshold: float | None
) -> None:
    texts = [f"text {index}" for index in range(len(scores))]
    options = {
        "scorer": TableScorer(dict(zip(texts, scores, strict=True))),
        "top_n": top_n,
        "score_threshold": threshold,
    }
    kept = [(i, score) for i, score in enumerate(scores) if threshold is None or score >= threshold]
    expected = sorted(kept, key=lambda each: (-each[1], each[0]))[:top_n]
    for adapter in ADAPTERS:
        assert asyncio.run(_await(adapter(QUERY, texts, **options))) == expected


@pytest.mark.parametrize("normalize", [True, False])
async def test_blank_texts_come_last_in_every_adapter(
    adapter: Adapter, checkpoint: Path, texts: list[str], normalize: bool
) -> None:
    lowest = 0.0 if normalize else -65504.0
    options: dict[str, Any] = {**on_cpu(checkpoint), "normalize": normalize}
    given_texts = ["", texts[0], " \n\x0c", texts[1], "\u200b"]
    ranked = await adapter(QUERY, given_texts, **options)
    assert sorted(index for index, _ in ranked[:2]) == [1, 3]
    assert ranked[2:] == [(0, lowest), (2, lowest), (4, lowest)]
    assert_same(await adapter(QUERY, given_texts, **options, top_n=3), ranked[:3])
    least = 1e-300 if normalize else -1e9
    assert_same(await adapter(QUERY, given_texts, **options, score_threshold=least), ranked[:2])
    assert await adapter(QUERY, ["", "\t"], **options) == [(0, lowest), (1, lowest)]
    with pytest.raises(InputError, match="passage 2 is blank") as caught:
        await adapter(QUERY, [texts[0], texts[1], ""], **options, blank_passages="refuse")
    assert caught.value.index == 2


async def test_a_blank_query_is_refused_with_every_scorer(adapter: Adapter, scorer: Scorer) -> None:
    for each in (scorer, TableScorer({})):
        for query in ("", " \n", "\u200b"):
            with pytest.raises(InputError, match="the query is blank"):
                await adapter(query, ["a"], scorer=each)


def test_both_adapters_mark_truncated_texts_alike(checkpoint: Path) -> None:
    texts = ["panda", "bamboo " * 100, ""]
    options: dict[str, Any] = {**on_cpu(checkpoint), "max_length": 64}
    expected: list[dict[str, Any]] = [{}, {"rerank_truncated": True}, {"rerank_blank": True}]

    def marks(**more: Any) -> list[list[dict[str, Any]]]:
        documents = BGEReranker(**options, **more).compress_documents(langchain_documents(texts), QUERY)
        nodes = BGERerankPostprocessor(**options, **more).postprocess_nodes(
            llama_index_nodes(texts), query_str=QUERY
        )
        by_position = [
            [document.metadata for document in sorted(documents, key=lambda each: each.metadata["at"])],
            [node.metadata for node in sorted(nodes, key=lambda each: each.node_id)],
        ]
        return [
            [{key: value for key, value in each.items() if key.startswith("rerank_")} for each in metadata]
            for metadata in by_position
        ]

    assert marks() == [expected, expected]
    assert marks(mark_unread=False) == [[{}, {}, {}]] * 2
    windows = {"long_passages": "windows", "window_overlap_tokens": 4, "query_max_length": 16}
    assert marks(**windows) == [[{}, {}, {"rerank_blank": True}]] * 2, "windows read all of it"


class PlainScorer(TableScorer):
    """Returns objects that have only an index and a score."""

    def rank(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [SimpleNamespace(index=each.index, score=each.score) for each in super().rank(*args, **kwargs)]

    async def arank(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.rank(*args, **kwargs)


async def test_a_scorer_that_returns_only_indices_and_scores_works(adapter: Adapter) -> None:
    ranked = await adapter(QUERY, ["a", "", "b"], scorer=PlainScorer({"b": 0.5, "": 0.25}))
    assert ranked == [(2, 0.5), (1, 0.25), (0, 0.0)]


def test_such_a_scorer_marks_nothing() -> None:
    options: dict[str, Any] = {"scorer": PlainScorer({})}
    reranker = BGEReranker(**options)
    (document,) = reranker.compress_documents([Document(page_content="a")], QUERY)
    assert document.metadata == {"relevance_score": 0.0}
    assert reranker.rerank(["a"], QUERY) == [{"index": 0, "relevance_score": 0.0}]
    (node,) = BGERerankPostprocessor(**options).postprocess_nodes(
        [NodeWithScore(node=TextNode(text="a"))], query_str=QUERY
    )
    assert node.metadata == {}


def test_marks_of_an_earlier_reranker_are_removed() -> None:
    options: dict[str, Any] = {"scorer": TableScorer({})}
    metadata = {"title": "a", "rerank_truncated": True, "rerank_blank": True}
    (document,) = BGEReranker(**options).compress_documents(
        [Document(page_content="a", metadata=metadata)], QUERY
    )
    assert document.metadata == {"title": "a", "relevance_score": 0.0}
    (node,) = BGERerankPostprocessor(**options).postprocess_nodes(
        [NodeWithScore(node=TextNode(text="a", metadata=metadata))], query_str=QUERY
    )
    assert node.metadata == {"title": "a"}
    assert metadata == {"title": "a", "rerank_truncated": True, "rerank_blank": True}


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
@pytest.mark.parametrize("threshold", [0, 0.0, -2, 1.0000001, 1.5, 50])
def test_a_threshold_off_the_scale_is_refused_at_construction(
    adapter_type: Callable[..., RerankOptions], checkpoint: Path, threshold: float
) -> None:
    message = r"score_threshold: .*normalize=True scores lie between 0 and 1.*normalize=False.*raw logits"
    with pytest.raises(ValidationError, match=message) as caught:
        adapter_type(score_threshold=threshold)
    (error,) = caught.value.errors()
    assert isinstance(error["ctx"]["error"], ConfigError)
    normalizing = Scorer.shared(
        ScorerConfig(model=str(checkpoint), device="cpu", dtype="float32", normalize=True)
    )
    with pytest.raises(ValidationError, match=message):
        adapter_type(scorer=normalizing, score_threshold=threshold)
    options = adapter_type(normalize=False, score_threshold=threshold)
    with pytest.raises(ValidationError, match=message):
        options.normalize = True
    assert options.normalize is False
    adapter_type(scorer=TableScorer({}), score_threshold=threshold)  # only this scorer knows its scale


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_thresholds_on_the_scale_are_accepted(
    adapter_type: Callable[..., RerankOptions], scorer: Scorer
) -> None:
    for threshold in (1, 1.0, 0.5, 1e-9, None):
        assert adapter_type(score_threshold=threshold).score_threshold == threshold
    assert adapter_type(normalize=False, score_threshold=-3.5).score_threshold == -3.5


@given(
    query=st.text(max_size=40),
    texts=st.lists(st.text(st.characters(), max_size=60).filter(str.strip), max_size=8),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adapters_agree_on_any_text(scorer: Scorer, query: str, texts: list[str]) -> None:
    results = [asyncio.run(_await(adapter(f"{query}?", texts, scorer=scorer))) for adapter in ADAPTERS]
    for ranked in results:
        assert_same(ranked, results[0])
        assert sorted(index for index, _ in ranked) == list(range(len(texts)))
        assert {type(score) for _, score in ranked} <= {float}


async def _await(result: Awaitable[T]) -> T:
    return await result


async def test_adapters_reject_the_same_input(adapter: Adapter) -> None:
    options = {"scorer": TableScorer({})}
    with pytest.raises(InputTypeError, match="the query must be a string"):
        await adapter(3, ["a"], **options)
    for bad in ({"top_n": -1}, {"score_threshold": float("nan")}, {"no_such_option": 1}, {"device": "tpu"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            await adapter(QUERY, ["a"], **bad)


@pytest.mark.parametrize(
    ("score", "kept_score"),
    [
        (None, None),
        (0.25, 0.25),
        (np.float32(0.25), 0.25),
        (Decimal("0.25"), 0.25),
        (3, 3.0),
        (float("nan"), None),
        (np.float32("nan"), None),
        (0.25j, None),
        (np.complex64(0.25 + 1j), None),
        (np.timedelta64(3), None),
        (Fraction(1, 4), 0.25),
        (np.int32(3), 3.0),
        (np.bool_(True), None),
        (10**400, None),
        (True, None),
        ("0.25", None),
    ],
    ids=repr,
)
def test_a_retrieval_score_is_kept_as_a_python_float(score: Any, kept_score: float | None) -> None:
    options: dict[str, Any] = {"scorer": TableScorer({}), "keep_retrieval_score": True}
    kept: dict[str, float] = {"retrieval_rank": 0}
    if kept_score is not None:
        kept["retrieval_score"] = kept_score
    document = Document(page_content="a", metadata={} if score is None else {"score": score})
    (returned,) = BGEReranker(**options).compress_documents([document], QUERY)
    found = {key: value for key, value in returned.metadata.items() if key.startswith("retrieval_")}
    node = NodeWithScore(node=TextNode(text="a"))
    node.score = score  # unlike the constructor, LlamaIndex checks no assignment
    (postprocessed,) = BGERerankPostprocessor(**options).postprocess_nodes([node], query_str=QUERY)
    for metadata in (found, postprocessed.metadata):
        assert metadata == kept
        assert [type(value) for value in metadata.values()] == [int, float][: len(kept)]
    json.loads(postprocessed.to_json())


@pytest.mark.parametrize("name", ["set", "frozenset", "DataFrame", "GeoDataFrame"])
def test_values_without_an_order_are_refused(name: str, scorer: Scorer) -> None:
    class DataFrame(list[str]):
        """A table, such as that of pandas: its items are the names of its columns."""

    class GeoDataFrame(DataFrame):
        """A table with places."""

    kinds: dict[str, Callable[..., Any]] = {
        "set": set,
        "frozenset": frozenset,
        "DataFrame": DataFrame,
        "GeoDataFrame": GeoDataFrame,
    }
    values = kinds[name](["a", "b"])
    reranker = BGEReranker(scorer=scorer)
    for call in (
        lambda: scorer.rank(QUERY, values),
        lambda: reranker.rerank(values, QUERY),
        lambda: reranker.rerank_many([(QUERY, values)]),
    ):
        with pytest.raises(InputTypeError, match=f"must be a sequence, not {name}"):
            call()
    assert len(scorer.rank(QUERY, {"a": 1, "b": 2}.keys())) == 2  # type: ignore[arg-type]  # has an order


# --- threads and event loops----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_type", ADAPTER_TYPES)
def test_options_that_two_threads_set_are_both_kept(adapter_type: type[RerankOptions]) -> None:
    is_set = threading.Event()

    class Slow(adapter_type):  # type: ignore[valid-type,misc]
        @field_validator("normalize")
        @classmethod
        def _wait(cls, value: bool) -> bool:
            other.start()
            is_set.wait(PATIENCE_S)  # the other thread sets its option while this one is being set
            return value

    def set_top_n() -> None:
        adapter.top_n = 7
        is_set.set()

    adapter = Slow(model="embedded")
    other = threading.Thread(target=set_top_n)
    adapter.normalize = False
    other.join(PATIENCE_S)
    assert (adapter.top_n, adapter.normalize) == (7, False)


def test_threads_that_share_documents_change_nothing(checkpoint: Path, texts: list[str]) -> None:
    num_documents, num_threads = 1000, 8
    words = " ".join(texts).split()
    metadata = {"nested": {"tags": ["a", "b"]}, "score": 0.5}
    contents = [" ".join(words[index % 200 : index % 200 + 5]) for index in range(num_documents)]
    documents = [
        Document(id=str(at), page_content=text, metadata={"at": at, **copy.deepcopy(metadata)})
        for at, text in enumerate(contents)
    ]
    nodes = [
        NodeWithScore(
            node=TextNode(
                id_=str(at),
                text=text,
                metadata=copy.deepcopy(metadata),
                excluded_embed_metadata_keys=list(metadata),
            ),
            score=0.5,
        )
        for at, text in enumerate(contents)
    ]
    before = copy.deepcopy((documents, nodes))
    options: dict[str, Any] = {**on_cpu(checkpoint), "top_n": 100, "keep_retrieval_score": True}
    reranker, postprocessor = BGEReranker(**options), BGERerankPostprocessor(**options)
    settings_before = (reranker.model_dump(), postprocessor.to_dict())
    barrier = threading.Barrier(num_threads)

    def rerank(number: int) -> tuple[list[Ranked], list[Ranked]]:
        query = f"{QUERY} {number}"
        barrier.wait()
        return (
            ranked_documents(reranker.compress_documents(documents, query)),
            ranked_nodes(postprocessor.postprocess_nodes(nodes, query_str=query)),
        )

    with ThreadPoolExecutor(num_threads) as pool:
        results = list(pool.map(rerank, range(num_threads)))
    assert (documents, nodes) == before
    assert (reranker.model_dump(), postprocessor.to_dict()) == settings_before
    for number, both in enumerate(results):
        alone = reranker.rerank(contents, f"{QUERY} {number}", top_n=None)
        score_of = {result["index"]: result["relevance_score"] for result in alone}
        for ranked in both:
            assert_same(ranked, [(index, score_of[index]) for index, _ in ranked])
            best = [result["relevance_score"] for result in alone[:100]]
            assert [score for _, score in ranked] == pytest.approx(best, abs=TOLERANCE)
    assert len({tuple(langchain) for langchain, _ in results}) == num_threads


async def watch_loop(work: Awaitable[T]) -> tuple[T, list[float]]:
    """Await something while a task wakes up every 5 ms. Return its result and the times between wake-ups."""
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    # A full garbage collection would visit all objects of the process and delay the event loop.
    gc.collect()
    gc.freeze()
    ticker = asyncio.create_task(tick())
    try:
        await asyncio.sleep(0)  # the clock of the sleeping task starts here
        result = await work
        await asyncio.sleep(0.02)  # so that it also wakes up after work that blocked to the end
    finally:
        ticker.cancel()
        gc.unfreeze()
    return result, gaps


async def test_the_loop_watcher_sees_a_block() -> None:
    async def block() -> None:
        time.sleep(0.3)  # noqa: ASYNC251  # what must not happen

    _, gaps = await watch_loop(block())
    assert max(gaps) >= 0.29


ASYNC_ADAPTERS = pytest.mark.parametrize(
    "adapter", [langchain_async, llama_index_async], ids=lambda adapter: adapter.__name__
)


@ASYNC_ADAPTERS
async def test_the_event_loop_stays_free(
    adapter: Adapter, make_fresh_checkpoint: Callable[[], Path], texts: list[str]
) -> None:
    """The loop stays free while a model loads, tokenizes and ranks 300 passages, some of them very long.

    Other programs can delay the loop too, but rarely three times in a row. Our own code would do it every time.
    """
    passages = [f"{number} {texts[number % len(texts)]}"[:250] for number in range(290)]
    passages += [f"{number} {TIBETAN_OM * 100_000}" for number in range(10)]
    longest_gaps: list[float] = []
    while len(longest_gaps) < 3 and (not longest_gaps or min(longest_gaps) >= 0.2):
        ranked, gaps = await watch_loop(adapter(QUERY, passages, **on_cpu(make_fresh_checkpoint())))
        assert len(ranked) == len(passages)
        longest_gaps.append(max(gaps))
    assert min(longest_gaps) < 0.2


@ASYNC_ADAPTERS
async def test_other_tasks_run_while_results_are_copied(adapter: Adapter) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count())
    ranked = await adapter(QUERY, [f"{number}" for number in range(800)], scorer=TableScorer({}))
    other.cancel()
    assert len(ranked) == 800
    assert turns >= 100


@ASYNC_ADAPTERS
async def test_a_model_loads_in_another_thread(
    adapter: Adapter, fresh_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A small model loads too fast to delay the loop visibly, so check the thread of its log messages."""
    caplog.set_level(logging.INFO, "bge_rerank_integrations")
    await adapter(QUERY, ["a"], **on_cpu(fresh_checkpoint))
    assert [record for record in caplog.records if "attention" in record.message]
    assert threading.get_ident() not in {record.thread for record in caplog.records}


@ASYNC_ADAPTERS
async def test_async_calls_leave_the_loops_default_pool_alone(
    adapter: Adapter, fresh_checkpoint: Path
) -> None:
    asyncio.get_running_loop().set_default_executor(ForbiddenPool())
    assert len(await adapter(QUERY, ["a", "b"], **on_cpu(fresh_checkpoint))) == 2
