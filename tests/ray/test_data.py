"""Ray datasets that are scored by actors."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra `ray`")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayError

from bge_rerank_integrations import DeviceLostError, Scorer, ScorerConfig, WorkerDiedError
from bge_rerank_integrations.errors import ConfigError, InputError
from bge_rerank_integrations.ray import ActorOptions, actors, data, rerank_dataset, score_dataset
from tests.support.tolerances import LOGIT_TOLERANCE

torch = pytest.importorskip("torch")
TOLERANCE = LOGIT_TOLERANCE[torch.float32]
QUERY = "what is a panda?"
CANARY = "CANARY-TEXT"
NUM_PAIRS = 320


@pytest.fixture
def config(checkpoint: Path) -> ScorerConfig:
    return ScorerConfig(model=checkpoint, device="cpu")


def fail_once(scorer: Scorer, table: pa.Table, *, folder: Path) -> pa.Table:
    """Score a table. Three blocks fail the first time, each in another way."""
    failures: dict[int, Any] = {
        10: partial(os._exit, 1),
        150: lambda: (_ for _ in ()).throw(DeviceLostError("the device is gone")),
        300: lambda: (_ for _ in ()).throw(WorkerDiedError("the worker is gone")),
    }
    for number in table.column("number").to_pylist():
        marker = folder / str(number)
        if number in failures and not marker.exists():
            marker.touch()
            next(iter(failures[number]() or ()), None)
    columns = ("query", "passage")
    return data._score_table(scorer, table, columns=columns, on_error="column")


def test_each_row_is_scored_once_although_actors_die(
    cluster: None, config: ScorerConfig, scorer: Scorer, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"query": QUERY, "passage": f"The panda {at} is a bear.", "number": at} for at in range(NUM_PAIRS)
    ]
    scored = actors.map_with_scorer(
        ray.data.from_items(rows),
        config,
        partial(fail_once, folder=tmp_path),
        ActorOptions(num_actors=2),
        rows_per_block=32,
    ).take_all()
    assert {path.name for path in tmp_path.iterdir()} == {"10", "150", "300"}
    found = {row["number"]: row["score"] for row in scored}
    assert len(scored) == len(found) == NUM_PAIRS
    expected = scorer.score([(QUERY, row["passage"]) for row in rows])
    assert [found[at] for at in range(NUM_PAIRS)] == pytest.approx(expected, abs=TOLERANCE)


def test_rerank_dataset(cluster: None, config: ScorerConfig, scorer: Scorer) -> None:
    rows: list[dict[str, Any]] = [
        {"text": QUERY, "candidates": ["hi", f"The panda {at} is a bear.", CANARY], "number": at}
        for at in range(40)
    ]
    rows[7]["text"] = None
    rows[8]["candidates"] = ["good", None, CANARY]
    rows[9]["candidates"] = []
    ds = ray.data.from_items(rows)
    ranked = rerank_dataset(
        ds,
        config,
        query_column="text",
        passages_column="candidates",
        top_n=2,
        actors=ActorOptions(rows_per_block=16),
    ).take_all()
    assert ds.columns() == ["text", "candidates", "number"]
    assert sorted(row["number"] for row in ranked) == list(range(40))
    for row in ranked:
        given = rows[row["number"]]
        assert {name: row[name] for name in given} == given
        if row["number"] in (7, 8):
            assert row["indices"] is row["scores"] is None
            assert CANARY not in row["error"]
        else:
            assert row["error"] is None
            expected = scorer.rank(given["text"], given["candidates"], 2)
            assert row["indices"] == [each.index for each in expected]
            assert row["scores"] == pytest.approx([each.score for each in expected], abs=TOLERANCE)
    by_number = {row["number"]: row["error"] for row in ranked}
    assert by_number[7] == "the query must be a string, not NoneType"
    assert by_number[8] == "passage 1 must be a string, not NoneType"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_string_that_is_not_utf_8_is_an_error_of_its_row(scorer: Scorer, kind: pa.DataType) -> None:
    raw = pa.array([b"a bear", CANARY.encode() + b"\xff", b"a panda"])
    if pa.types.is_dictionary(kind):
        texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), raw.view(pa.string()))
    else:
        texts = raw.cast(pa.large_binary() if kind == pa.large_string() else pa.binary()).view(kind)
    table = pa.table({"query": pa.array([QUERY] * 3), "passage": texts})
    scored = data._score_table(scorer, table, columns=("query", "passage"), on_error="column")
    assert scored.column("error").to_pylist() == [None, "the passage must be a string, not bytes", None]
    assert scored.column("score").to_pylist()[0] is not None

    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3]), texts)
    table = pa.table({"query": pa.array([QUERY] * 2), "passages": lists})
    ranked = data._rank_table(
        scorer, table, columns=("query", "passages"), top_n=None, threshold=None, on_error="column"
    )
    assert ranked.column("error").to_pylist() == [None, "passage 0 must be a string, not bytes"]


def test_a_struct_with_a_string_that_is_not_utf_8_is_an_error_of_its_row(scorer: Scorer) -> None:
    raw = pa.array([b"a bear", CANARY.encode() + b"\xff"])
    structs = pa.StructArray.from_arrays([raw.view(pa.string())], names=["text"])
    table = pa.table({"query": pa.array([QUERY] * 2), "passage": structs})
    scored = data._score_table(scorer, table, columns=("query", "passage"), on_error="column")
    first, second = scored.column("error").to_pylist()
    assert first == "the passage must be a string, not dict"
    assert second in {"the passage must be a string, not bytes", "the passage must be a string, not dict"}


@pytest.mark.parametrize("is_ragged", [False, True])
def test_a_dataset_of_pandas(
    is_ragged: bool, cluster: None, config: ScorerConfig, scorer: Scorer, tmp_path: Path
) -> None:
    pd = pytest.importorskip("pandas")
    lengths = [1, 2, 2] if is_ragged else [2, 2, 2]
    rows: list[dict[str, Any]] = [
        {"query": QUERY, "passages": ["hi", f"a bear {at}"][:length], "number": at}
        for at, length in enumerate(lengths)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    frame = pd.read_parquet(tmp_path / "rows.parquet")  # its lists are arrays of NumPy
    if is_ragged:
        frame["kind"] = pd.Categorical(["a", "b", "a"])
    ranked = rerank_dataset(ray.data.from_pandas(frame), config).take_all()
    assert sorted(row["number"] for row in ranked) == [0, 1, 2]
    for row in ranked:
        expected = scorer.rank(QUERY, rows[row["number"]]["passages"])
        assert list(row["indices"]) == [each.index for each in expected]
        assert list(row["passages"]) == rows[row["number"]]["passages"]


def test_a_model_that_cannot_be_loaded_is_named(cluster: None, tmp_path: Path) -> None:
    ds = ray.data.from_items([{"query": QUERY, "passage": "a"}])
    with pytest.raises(RayError, match="CheckpointNotFoundError"):
        score_dataset(ds, ScorerConfig(model=f"{tmp_path}/missing", device="cpu")).take_all()


def test_a_frame_with_a_column_of_mixed_types_is_scored(cluster: None, config: ScorerConfig) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"query": [QUERY, QUERY], "passage": ["a", "b"], "mixed": [{1: 2}, "a"]})
    scored = score_dataset(ray.data.from_pandas(frame), config).take_all()
    assert {str(row["mixed"]) for row in scored} == {"{1: 2}", "a"}
    assert all(row["error"] is None for row in scored)


@pytest.mark.parametrize(
    ("column", "second"),
    [
        ([{1: 2}, "a"], ["b", "c"]),
        ([np.ones((2, 2))] * 2, ["b", "c"]),
        ([0, 1], ["b", 5]),
    ],
    ids=["mixed", "tensor", "malformed"],
)
def test_a_frame_with_lists_of_numpy_and_a_column_that_arrow_has_no_type_for(
    column: list[Any], second: list[Any], cluster: None, config: ScorerConfig
) -> None:
    pd = pytest.importorskip("pandas")
    # as pandas reads them from Parquet
    lists = [np.array(["a"], dtype=object), np.array(second, dtype=object)]
    frame = pd.DataFrame({"query": [QUERY, QUERY], "passages": lists, "column": column})
    first, last = sorted(
        rerank_dataset(ray.data.from_pandas(frame), config).take_all(), key=lambda row: len(row["passages"])
    )
    assert (list(first["indices"]), first["error"]) == ([0], None)
    if 5 in second:
        assert (last["indices"], last["error"]) == (None, "passage 1 must be a string, not int")
    else:
        assert (sorted(last["indices"]), last["error"]) == ([0, 1], None)
    assert str(first["column"]) == str(column[0])


def test_actors_get_absolute_paths(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    (tmp_path / "embedded").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert actors._with_absolute_paths(ScorerConfig(cache_folder="~/hub")).cache_folder == f"{tmp_path}/hub"
    config = actors._with_absolute_paths(ScorerConfig(model=checkpoint.name, cache_folder="cache"))
    assert config.model == str(checkpoint)
    assert config.cache_folder == str(checkpoint.parent / "cache")
    monkeypatch.chdir(tmp_path)
    for model in ("embedded", "BAAI/bge-reranker-base", "a" * 300):
        assert actors._with_absolute_paths(ScorerConfig(model=model)).model == model


def test_a_malformed_row_can_stop_the_job(
    cluster: None, config: ScorerConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": CANARY, "passage": "a"}, {"query": CANARY, "passage": None}]
    scored = score_dataset(ray.data.from_items(rows), config, on_error="raise")
    with pytest.raises(RayError, match="row 1 of a block: the passage must be a string") as caught:
        scored.take_all()
    assert CANARY not in str(caught.value)
    assert CANARY not in "".join(capfd.readouterr())


def test_a_dataset_over_ray_client_is_refused(
    cluster: None, config: ScorerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = ray.data.from_items([{"query": "a", "passage": "b"}])
    monkeypatch.setattr("ray.util.client.ray.is_connected", lambda: True)
    with pytest.raises(ConfigError, match="Ray Data does not run over Ray Client"):
        score_dataset(ds, config)


def test_settings_are_checked_before_the_job(cluster: None, config: ScorerConfig) -> None:
    ds = ray.data.from_items([{"query": "q", "passages": ["p"], "passage": "p"}])
    with pytest.raises(ConfigError, match=r"no column \['texts'\]"):
        rerank_dataset(ds, config, passages_column="texts")
    with pytest.raises(ConfigError, match=r"already has the column \['error'\]"):
        score_dataset(ray.data.from_items([{"query": "q", "passage": "p", "error": ""}]), config)
    with pytest.raises(ConfigError, match="on_error must be one of"):
        score_dataset(ds, config, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_n"):
        rerank_dataset(ds, config, top_n=-1)
    with pytest.raises(InputError, match="threshold"):
        rerank_dataset(ds, ScorerConfig(model="embedded", normalize=True), threshold=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_actors": 0}, "num_actors"),
        ({"num_actors": True}, "num_actors"),
        ({"concurrent_calls": 1.5}, "concurrent_calls"),
        ({"rows_per_block": 0}, "rows_per_block"),
        ({"num_cpus": -1}, "num_cpus"),
        ({"num_gpus": float("nan")}, "num_gpus"),
        ({"num_gpus": "1"}, "num_gpus"),
    ],
)
def test_wrong_actor_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActorOptions(**options)


@pytest.mark.parametrize(
    ("num_actors", "has_checkpoints", "available", "expected"),
    [
        (1, False, 16, None),
        (15, False, 16, None),
        (16, False, 16, 0.93),
        (1, True, 2, 0),
        (2, True, 3, 0.5),
        (3, True, 3, 0.33),
        (4, False, 0, 0),
    ],
)
def test_actors_leave_cpus_to_other_tasks(
    num_actors: int,
    has_checkpoints: bool,
    available: float,
    expected: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": available})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": available}}])
    options = ActorOptions(num_actors=num_actors)
    assert actors._num_cpus(options, has_checkpoints=has_checkpoints) == expected


@pytest.mark.parametrize(
    ("num_actors", "cpus_of_nodes", "expected"),
    [(2, [2, 2], 0.5), (1, [2, 2], None), (8, [2, 4, 4], 0.62), (2, [16, 1], 0.5 * 15), (64, [16] * 8, None)],
)
def test_actors_leave_cpus_after_the_loss_of_a_node(
    num_actors: int, cpus_of_nodes: list[float], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in cpus_of_nodes]
    dead = {"Alive": False, "Resources": {"CPU": 100.0}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(cpus_of_nodes)})
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, dead])
    share = actors._num_cpus(ActorOptions(num_actors=num_actors), has_checkpoints=False)
    assert share == (None if expected is None or expected >= 1 else expected)


def test_a_job_that_may_stall_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
    assert actors._num_cpus(ActorOptions(num_cpus=1), has_checkpoints=True) == 1
    assert "may wait forever. Reserve at most 0 for each actor" in caplog.text
    caplog.clear()
    assert actors._num_cpus(ActorOptions(num_cpus=0.5), has_checkpoints=False) == 0.5
    assert not caplog.text


def test_a_job_that_waits_for_gpus_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2, "GPU": 1})
    actors._warn_without_gpus(ActorOptions(num_gpus=0.5, num_actors=2))
    assert not caplog.text
    actors._warn_without_gpus(ActorOptions(num_gpus=1, num_actors=2))
    assert "2 actor(s) reserve 1 GPU(s) each, and the cluster has 1" in caplog.text
