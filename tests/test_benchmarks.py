"""The benchmarks: workloads, checks of contenders, arithmetic, and a whole run of each command."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.common import spread
from benchmarks.device_only import DeviceModel, device_seconds, prepare
from benchmarks.gpu import count_flops
from benchmarks.measure import Reference, check, problems, tune, wrong_way
from benchmarks.models import prepared_model, write_plain
from benchmarks.peers.contender import Contender, longest_first, scored_by_query
from benchmarks.peers.registry import ENTRIES, select
from benchmarks.workloads import SPECS, WorkloadMaker
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.engine.build import Model
from bge_rerank_integrations.engine.checkpoint.locate import EMBEDDED_FOLDER
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.cuda.graphs import Graphs, Times, plan_buckets
from bge_rerank_integrations.engine.model import PackedCrossEncoder
from bge_rerank_integrations.engine.shape import EncoderShape
from tests.support.attention import FLOAT32_ON_CPU, bounds_attention
from tests.support.engine import CPU

ROOT = Path(__file__).parents[1]
PEERS = {"cross-encoder": "sentence_transformers", "onnx": "onnxruntime", "openvino": "nncf"}
PADDING = 1


@pytest.fixture(scope="module")
def maker(checkpoint: Path) -> WorkloadMaker:
    return WorkloadMaker(checkpoint / "tokenizer.json", seed=0)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=1800,
        check=False,
    )


def benchmark(*arguments: str) -> tuple[dict[str, Any], str]:
    result = run(sys.executable, "-m", "benchmarks", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert not report["problems"]
    assert report["hardware"]["cpu"]
    assert report["versions"]["torch"]
    return report, result.stdout


# Workloads.


def test_workloads_have_the_stated_sizes(maker: WorkloadMaker) -> None:
    queries = {"A": 1, "B": 32, "C": 1, "D": 1, "E": 100}
    assert {letter: spec.num_queries for letter, spec in SPECS.items()} == queries
    pairs = {"A": 100, "B": 3200, "C": 100, "D": 8, "E": 10_000}
    assert {letter: spec.num_pairs for letter, spec in SPECS.items()} == pairs
    made = maker.make("B", num_pairs=250)
    assert [len(list(group)) for _, group in itertools.groupby(query for query, _ in made.pairs)] == [
        100,
        100,
        50,
    ]


def test_mixed_lengths_are_log_normal_and_cut_at_512(maker: WorkloadMaker) -> None:
    lengths = sorted(maker.make("E", num_pairs=2000).num_tokens)
    assert lengths[1000] == pytest.approx(110, rel=0.06)
    # These are the 10 % and 90 % quantiles of a log-normal distribution with sigma 0.6.
    assert lengths[200] == pytest.approx(110 * math.exp(-0.6 * 1.2816), rel=0.1)
    assert lengths[1800] == pytest.approx(110 * math.exp(0.6 * 1.2816), rel=0.1)
    assert lengths[-1] == 512


@pytest.mark.parametrize(("letter", "length", "num_pairs"), [("C", 512, 100), ("D", 32, 8), ("D", 32, 1600)])
def test_lengths_that_are_stated_are_exact(
    maker: WorkloadMaker, letter: str, length: int, num_pairs: int
) -> None:
    assert set(maker.make(letter, num_pairs=num_pairs).num_tokens) == {length}


def test_a_length_without_room_for_a_query_is_refused(maker: WorkloadMaker) -> None:
    with pytest.raises(ValueError, match="no query of 3 words fits into pairs of 14 tokens"):
        maker.make("D", length=14)


def test_workloads_are_seeded(checkpoint: Path, maker: WorkloadMaker) -> None:
    first = maker.make("A", num_pairs=5)
    assert maker.make("A", num_pairs=5) == first
    other = WorkloadMaker(checkpoint / "tokenizer.json", seed=1).make("A", num_pairs=5)
    assert not {passage for _, passage in other.pairs} & {passage for _, passage in first.pairs}


def test_no_text_comes_twice_and_all_keep_their_length(maker: WorkloadMaker) -> None:
    workload = maker.make("D")
    calls = [pairs for repeat in range(3) for pairs in workload.texts(repeat)]
    assert len(calls) == 3 * SPECS["D"].num_calls
    assert workload.texts(1) == calls[SPECS["D"].num_calls : 2 * SPECS["D"].num_calls]
    for pairs in calls[::7]:
        assert maker.count(pairs) == workload.num_tokens
    passages = [passage for pairs in calls for _, passage in pairs]
    assert len(set(passages)) > 0.99 * len(passages)


def test_real_text_is_what_bm25_finds(maker: WorkloadMaker, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs bm25s")
    rows = [{"_id": f"p{n}", "text": f"panda number {n}"} for n in range(4)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "which panda"}) + "\n")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q\tp1\t1\n")
    workload = maker.make_real(tmp_path, num_pairs=3)
    assert len(workload.pairs) == len(set(workload.pairs)) == 3
    assert all(pair[0] == "which panda" and pair[1].startswith("panda number") for pair in workload.pairs)


def test_pairs_are_taken_from_all_over() -> None:
    pairs = [("query", str(number)) for number in range(40)]
    assert [int(number) for _, number in spread(pairs, 8)] == list(range(0, 40, 5))
    assert spread(pairs, 100) == pairs


# Contenders and their checks, with functions instead of models.


def contender(maker: WorkloadMaker, logits: Any, **options: Any) -> Contender:
    return Contender(name="a peer", dtype="float32", run=logits, **options)


@pytest.fixture
def held_against(maker: WorkloadMaker) -> Reference:
    pairs = maker.make("A", num_pairs=6).pairs
    return Reference(pairs, maker.ids(pairs), [0.5, -1.0, 2.0, 0.1, -0.3, 1.0])


def checked(maker: WorkloadMaker, reference: Reference, values: list[float], **options: Any) -> list[str]:
    result = check(contender(maker, lambda pairs, size: values, **options), reference, PADDING)
    return problems([{"name": "a peer", "dtype": "float32", **result}], reference)


def test_what_agrees_is_no_problem(maker: WorkloadMaker, held_against: Reference) -> None:
    close = [logit + 5e-5 for logit in held_against.logits]
    assert checked(maker, held_against, close) == []


def test_other_logits_are_a_problem(maker: WorkloadMaker, held_against: Reference) -> None:
    off = [held_against.logits[0] + 2e-4, *held_against.logits[1:]]
    [problem] = checked(maker, held_against, off)
    assert "differs by 2.00e-04" in problem


def test_another_order_is_a_problem(maker: WorkloadMaker, held_against: Reference) -> None:
    logits = held_against.logits
    right = [-float(sorted(logits, reverse=True).index(logit)) for logit in logits]
    assert checked(maker, held_against, right, gives_order=True) == []
    swapped = [right[2], right[1], right[0], *right[3:]]
    sigmoid = [1 / (1 + math.exp(-logit)) for logit in logits]
    assert wrong_way(held_against, swapped) == pytest.approx(sigmoid[2] - sigmoid[0])
    assert len(checked(maker, held_against, swapped, gives_order=True)) == 1


def test_other_token_ids_are_a_problem(maker: WorkloadMaker, held_against: Reference) -> None:
    rows = [np.frombuffer(ids, dtype=np.int32) for ids in held_against.ids]
    padded = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids

    def shows(batch: Any) -> Any:
        @contextlib.contextmanager
        def watch(record: Any) -> Any:
            record(batch)
            yield

        return watch

    peer = contender(maker, lambda pairs, size: held_against.logits, watch=shows(padded))
    result = check(peer, held_against, PADDING)
    assert result["same_ids"]
    assert result["rows_per_token"] == padded.size / sum(map(len, rows))
    padded[3, 2] += 1
    [problem] = checked(maker, held_against, held_against.logits, watch=shows(padded))
    assert "read different token ids" in problem


def test_scores_that_hardly_vary_say_nothing(maker: WorkloadMaker) -> None:
    pairs = maker.make("A", num_pairs=2).pairs
    flat = Reference(pairs, maker.ids(pairs), [1.0, 1.01])
    assert "hardly vary" in checked(maker, flat, flat.logits)[0]


def test_the_fastest_batch_size_is_kept(maker: WorkloadMaker) -> None:
    def score(pairs: Any, size: int | None) -> list[float]:
        time.sleep(0.0 if size == 8 else 0.2)
        return [0.0] * len(pairs)

    peer = contender(maker, score, batch_sizes=(1, 8, 32), batch_size=32)
    tune(peer, maker.make("A", num_pairs=10).pairs)
    assert peer.batch_size == 8


def test_what_is_slow_the_first_time_is_not_timed_then(maker: WorkloadMaker) -> None:
    seen: set[tuple[int, int | None]] = set()

    def score(pairs: Any, size: int | None) -> list[float]:
        for _, passage in pairs:
            if size == 1 and (len(passage), size) not in seen:
                seen.add((len(passage), size))
                time.sleep(0.05)
        time.sleep(0.01 if size == 1 else 0.1)
        return [0.0] * len(pairs)

    peer = contender(maker, score, batch_sizes=(1, 8), batch_size=8)
    tune(peer, maker.make("A", num_pairs=10).pairs)
    assert peer.batch_size == 1


def test_pairs_come_back_in_their_order() -> None:
    pairs = [("q", "ab"), ("q", "abcd"), ("q", "a"), ("r", "abc")]
    seen: list[Any] = []

    def score(ordered: Any) -> list[float]:
        seen.extend(ordered)
        return [float(len(passage)) for _, passage in ordered]

    assert longest_first(pairs, score) == [2, 4, 1, 3]
    assert [len(passage) for _, passage in seen] == [4, 3, 2, 1]
    places = scored_by_query(
        pairs, lambda query, texts: sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    )
    assert places == [-1, 0, -2, 0]


def test_names_select_contenders() -> None:
    assert select(["cross-encoder"]) == [
        "cross-encoder-default",
        "cross-encoder-best",
        "cross-encoder-best-float32",
    ]
    assert select(["ours-float32", "onnx-int8"]) == ["ours-float32", "onnx-int8"]
    assert set(ENTRIES) > set(select(["ours"]))
    with pytest.raises(ValueError, match="no contender 'nobody'"):
        select(["ours", "nobody"])


def test_importing_the_command_imports_no_peer() -> None:
    peers = ["sentence_transformers", "FlagEmbedding", "onnxruntime", "openvino", "nncf", "matplotlib"]
    code = f"import benchmarks.__main__, sys; print([name for name in {peers} if name in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_a_plain_copy_scores_the_same(tmp_path: Path) -> None:
    write_plain(EMBEDDED_FOLDER, tmp_path / "plain")
    pairs = [("what is a panda?", "A bear that eats bamboo."), ("what is a panda?", "The stock market fell.")]
    with (
        Scorer("embedded", device="cpu", dtype="float32") as ours,
        Scorer(tmp_path / "plain", device="cpu", dtype="float32") as plain,
    ):
        assert plain.score(pairs) == pytest.approx(ours.score(pairs), abs=1e-5)


# Arithmetic.


def test_flops_are_those_of_the_products() -> None:
    shape = EncoderShape(
        vocab_size=10,
        hidden_size=4,
        num_layers=3,
        num_heads=2,
        intermediate_size=8,
        max_position_embeddings=10,
        type_vocab_size=1,
        padding_idx=1,
        layer_norm_eps=1e-5,
    )
    # A product [n, k] x [k, m] takes 2 n k m operations. For a sequence of 5 tokens: query, key, value and output
    # projections, both feed-forward layers, attention scores and weighted sums.
    products = [(5, 4, 4)] * 4 + [(5, 4, 8), (5, 8, 4), (5, 4, 5), (5, 5, 4)]
    of_last = [(5, 4, 4)] * 2 + [(1, 4, 4)] * 2 + [(1, 4, 8), (1, 8, 4), (1, 4, 5), (1, 5, 4)]
    head = [(1, 4, 4), (1, 4, 1)]

    def flops(parts: list[tuple[int, int, int]]) -> int:
        return sum(2 * n * k * m for n, k, m in parts)

    assert count_flops(shape, [5], all_rows=True) == 3 * flops(products) + flops(head)
    assert count_flops(shape, [5, 5]) == 2 * (2 * flops(products) + flops(of_last) + flops(head))


# Whole runs.


def test_speed_compares_with_what_is_installed() -> None:
    wanted = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    if not wanted:
        pytest.skip("needs one of sentence-transformers, onnxruntime and nncf")
    report, output = benchmark(
        "speed", "--shape", "tiny", "--device", "cpu", "--workload", "A", "D", "--num-pairs", "6", "--repeats", "2",
        "--contenders", "ours-float32", *wanted,
    )  # fmt: skip
    assert [workload["name"] for workload in report["workloads"]] == ["A", "D"]
    for workload in report["workloads"]:
        found = {result["key"]: result for result in workload["results"]}
        assert set(found) == set(select(["ours-float32", *wanted])) - set(report["missing"])
        assert found["ours-float32"]["rows_per_token"] == 1
        assert all(len(result["wall_s_all"]) == len(result["cpu_s_all"]) == 2 for result in found.values())
        assert all(result["pairs_per_s"] > 0 and result["same_ids"] for result in found.values())
    assert "this package, float32" in output


def test_length_reaches_its_last_line() -> None:
    report, _ = benchmark(
        "length", "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--contenders", "ours-float32",
        "--lengths", "64", "128", "--num-pairs", "3",
    )  # fmt: skip
    assert [(each["length"], each["max_tokens"]) for each in report["workloads"]] == [(64, 64), (128, 128)]


def test_linear_fails_where_many_pairs_are_slower() -> None:
    result = run(
        sys.executable, "-m", "benchmarks", "linear", "--shape", "tiny", "--device", "cpu", "--repeats", "1",
        "--contenders", "ours-float32", "--few", "20", "--many", "200",
    )  # fmt: skip
    report = json.loads(result.stdout.splitlines()[-1])
    assert [each["num_pairs"] for each in report["workloads"]] == [20, 200]
    [found] = report["results"]
    assert found["ratio"] == pytest.approx(found["many"]["tokens_per_s"] / found["few"]["tokens_per_s"])
    is_slower = found["ratio"] < 0.9  # this can happen on a busy machine
    assert (result.returncode, len(report["problems"])) == (int(is_slower), int(is_slower))


def test_memory_is_of_one_contender_alone() -> None:
    report, _ = benchmark(
        "memory", "--shape", "tiny", "--device", "cpu", "--num-pairs", "3",
        "--contenders", "ours-float32", "ours-float16",
    )  # fmt: skip
    assert set(report["missing"]) == {"ours-float16"}
    measured = report["results"]["ours-float32"]
    assert 0 < measured["before_bytes"] < measured["peak_bytes"]


def test_fidelity_holds_precisions_against_float32(tmp_path: Path) -> None:
    for package in ("bm25s", "ir_measures"):
        pytest.importorskip(package, reason=f"needs {package}")
    topics = ["panda bamboo", "cobra venom", "stock market"]
    rows = [
        {"_id": f"{t}{n}", "text": f"{topic} text {n}"} for t, topic in enumerate(topics) for n in range(6)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": f"q{t}", "text": f"{topic} text"} for t, topic in enumerate(topics)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("".join(f"q{t}\t{t}1\t1\n" for t in range(3)))
    report, output = benchmark(
        "fidelity", "--model", "embedded", "--device", "cpu", "--beir", str(tmp_path), "--depth", "4", "10",
        "--every", "2", "--contenders", "ours",
    )  # fmt: skip
    [found] = report["sets"]
    assert (found["num_queries"], found["num_pairs"]) == (2, 20)
    assert [each["depth"] for each in found["depths"]] == [4, 10]
    for each in found["depths"]:
        for result in each["results"]:
            assert 0.5 < result["tau_b"] <= 1
            assert 0 <= result["nDCG@10"] <= 1
    assert "nDCG@10, 4" in output


def test_serve_measures_every_load_over_http_and_in_process() -> None:
    report, output = benchmark(
        "serve", "--shape", "tiny", "--device", "cpu", "--seconds", "0.2", "--repeats", "1", "--callers", "1", "16",
        "--contenders", "http-ours", "http-infinity", "in-process-scorer",
    )  # fmt: skip
    assert set(report["missing"]) == {"http-infinity"}
    assert "--infinity" in report["missing"]["http-infinity"]
    found = {(each["key"], each["mode"], each["load"]) for each in report["results"]}
    for key in ("http-ours", "in-process-scorer"):
        assert {(key, "closed", 1), (key, "closed", 16), (key, "mixed", 4)} <= found
        assert sum(each[:2] == (key, "open") for each in found) == 4
    for each in report["results"]:
        assert not each["errors"]
        assert each["num_requests"] > 0
        assert 0 < each["p50_s"] <= each["p99_s"]
    assert report["max_difference"]["in-process-scorer"] <= 1e-4
    assert report["http"]["added_ms"] == report["http"]["http_ms"] - report["http"]["rank_ms"]
    assert "so HTTP adds" in output
    assert "so the queue takes" in output


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_the_cpu_script_measures_each_shape_with_and_without_amx() -> None:
    settings = {"SHAPES": "tiny", "NUM_PAIRS": "4", "REPEATS": "1", "PYTHON": sys.executable}
    result = run("sh", "benchmarks/cpu.sh", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    cpu = Path("/proc/cpuinfo")
    assert len(reports) == (2 if cpu.exists() and "amx_int8" in cpu.read_text(encoding="utf-8") else 1)
    for report in reports:
        assert [workload["name"] for workload in report["workloads"]] == ["A", "C", "D"]


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_the_gpu_script_reaches_its_last_line_on_a_cpu() -> None:
    result = run("sh", "benchmarks/gpu.sh", DEVICE="cpu", SHAPE="tiny", PYTHON=sys.executable)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    dtypes = list(report["machine"])
    assert dtypes[0] == "float32"
    assert report["machine"]["float32"]["attention"] == FLOAT32_ON_CPU
    assert report["ceiling_tflops"]["float32"] > 0
    assert "ours-float16" in report["missing"], "a CPU emulates float16"
    throughput = report["throughput"]["results"]
    assert [each["dtype"] for each in throughput] == dtypes
    for each in throughput:
        assert each["device_graphs"] == 0
        assert each["device_pairs_per_s"] > 0
        assert each["pairs_per_s"] > 0
        if each["dtype"] != "int8":
            assert each["device_share_of_ceiling"] > 0
            assert each["share_of_ceiling"] > 0
    assert 0 < len(report["profile"]["kernels"]) <= 15
    assert sum(each["share"] for each in report["profile"]["kernels"]) <= 1 + 1e-9
    graphs = report["graphs"]["tiny"]
    assert [each["workload"] for each in graphs] == ["D", "A", "D", "A"]
    assert all(each["device_s"] > 0 and each["wall_s"] > 0 and each["replayed"] == 0 for each in graphs)
    assert [workload["name"] for workload in report["latency"]["tiny"]] == ["D", "A", "C"]
    assert f"log: attention on cpu in torch.float32: {FLOAT32_ON_CPU}" in result.stdout


def test_the_device_only_time_covers_batches_that_graphs_replay() -> None:
    def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        output = function().clone()
        return lambda: output.copy_(function())

    with prepared_model(shape="tiny", model=None, device="cpu") as setup:
        maker, shape = WorkloadMaker(setup.tokenizer_path, seed=0), setup.shape()
        ids = maker.ids(maker.make("A", num_pairs=20).pairs)
        weights = load_weights(setup.plain, shape, device=CPU, dtype=torch.float32)
        forward = PackedCrossEncoder(shape, weights, attention=bounds_attention)
        graphs = Graphs(
            forward,
            device=CPU,
            padding_idx=1,
            buckets=plan_buckets(512, 700),
            capture=capture,
            measure=lambda function: Times(1.0, 1.0),
        )
        graphs.capture()
        plain = DeviceModel(Model(forward), CPU, 1, 1000)
        graphed = plain._replace(model=Model(forward, graphs=graphs))
        assert (plain.num_graphs, graphed.num_graphs) == (0, len(plan_buckets(512, 700)))
        eager, replayed = prepare(plain, ids), prepare(graphed, ids)
        assert (eager.num_replayed, len(eager.batches)) == (0, len(replayed.batches))
        assert 0 < replayed.num_replayed < len(replayed.batches), "some batches are larger than any graph"
        for (batch, _), (other, _) in zip(eager.batches, replayed.batches, strict=True):
            expected = torch.as_tensor(eager.run(batch))
            torch.testing.assert_close(torch.as_tensor(replayed.run(other))[: len(expected)], expected)
        assert device_seconds(graphed, ids, repeats=2) > 0


def test_a_real_tokenizer_replaces_the_small_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    tokenizer.enable_padding(length=77)
    tokenizer.enable_truncation(10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with prepared_model(
        shape="tiny", model=None, device="cpu", tokenizer=tmp_path / "tokenizer.json"
    ) as setup:
        assert setup.shape().vocab_size == tokenizer.get_vocab_size()
        maker = WorkloadMaker(setup.tokenizer_path, seed=0)
        assert set(maker.make("C", num_pairs=3).num_tokens) == {512}
        with Scorer(setup.model, device="cpu") as scorer:
            assert len(scorer.score([("what is a panda?", "a bear " * 100)])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--workload", "F"], "workload F needs --beir"),
        (["speed", "--num-pairs", "1"], "--num-pairs must be at least 2"),
        (["speed", "--repeats", "0"], "--repeats must be positive"),
        (["speed", "--contenders", "nobody"], "no contender 'nobody'"),
        (["length", "--lengths", "8"], "--lengths must be from 64 to 512"),
        (["linear", "--contenders", "onnx"], "--contenders must name one of this package's contenders"),
        (["linear", "--few", "20", "--many", "10"], "less than --many"),
        (["memory", "--batch-size", "0"], "--batch-size must be positive"),
        (["fidelity", "--beir", "."], "fidelity needs --model"),
        (["gpu", "--model", "embedded"], "leave --model out"),
        (["gpu", "--tokenizer", "nowhere.json"], "--tokenizer nowhere.json is not a file"),
        (["serve", "--seconds", "0"], "--seconds and --callers must be positive"),
        (["serve", "--callers", "0"], "--seconds and --callers must be positive"),
        (["serve", "--contenders", "ours"], "no contender 'ours'; choose from http-ours"),
    ],
)
def test_bad_usage_is_refused_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
