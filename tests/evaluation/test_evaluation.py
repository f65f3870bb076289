"""Measures, datasets and runs, compared with values computed by hand."""

from __future__ import annotations

import ast
import gzip
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import DatasetError
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import (
    BeirDataset,
    format_run,
    read_beir,
    read_run,
    sorted_run,
)
from bge_rerank_integrations.evaluation.measures import bootstrap, evaluate, measure, reranked_to_depth
from bge_rerank_integrations.evaluation.plots import plot_report
from bge_rerank_integrations.evaluation.runs import rerank_run

QRELS = {"q1": {"a": 2, "b": 1}, "q2": {"c": 1}}


def test_measures_are_those_of_the_definitions() -> None:
    run = {"q1": {"x": 3.0, "b": 2.0, "a": 1.0}, "q2": {"c": 9.0, "a": 8.0}}
    values = measure(QRELS, run, ["nDCG@10", "MRR@10", "MAP", "R@2"])
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert values["nDCG@10"]["q1"] == pytest.approx((1 / math.log2(3) + 2 / math.log2(4)) / ideal)
    assert values["nDCG@10"]["q2"] == 1
    assert values["MRR@10"] == {"q1": 0.5, "q2": 1}
    assert values["MAP"]["q1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert values["R@2"] == {"q1": 0.5, "q2": 1}


def test_a_query_that_the_run_lacks_counts_as_zero() -> None:
    values = measure(QRELS, {"q2": {"c": 1.0}, "q1": {}}, ["nDCG@10", "MRR@10"])
    assert values == {"nDCG@10": {"q1": 0, "q2": 1}, "MRR@10": {"q1": 0, "q2": 1}}


def test_equal_scores_count_in_the_order_given_not_by_id() -> None:
    for order, expected in ((["a", "z"], 1.0), (["z", "a"], 0.5)):
        values = measure({"q": {"a": 1}}, {"q": dict.fromkeys(order, 1.0)}, ["MRR@10"])
        assert values["MRR@10"]["q"] == expected


def test_reranking_to_a_depth_leaves_the_rest_below() -> None:
    first = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    scores = {"q": {"a": 0.0, "b": 5.0, "c": 9.0}}
    orders = [list(sorted_run(reranked_to_depth(first, scores, depth)["q"])) for depth in (0, 1, 2, 3)]
    assert orders == [["a", "b", "c"], ["a", "b", "c"], ["b", "a", "c"], ["c", "b", "a"]]


def test_the_bootstrap_is_paired_and_repeatable() -> None:
    before = [index / 100 for index in range(100)]
    constant = bootstrap(before, [value + 0.5 for value in before])
    assert constant == pytest.approx(
        (0.5, 0.5, 0.5)
    )  # all differences are equal, although the values are not
    noisy = bootstrap(before, before[::-1])
    assert noisy == bootstrap(before, before[::-1])
    assert noisy.low < 0 < noisy.high
    assert noisy.mean == pytest.approx(0)
    assert noisy.high == pytest.approx(1.96 * 0.577 / 10, rel=0.1)  # differences are uniform from -1 to 1


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    """Return a BEIR folder of example passages. The beginning of a passage is the query for it."""
    (tmp_path / "qrels").mkdir()
    english = [text for text in texts if text.isascii()][:30]
    corpus = [{"_id": f"p{i}", "title": "" if i % 2 else "T", "text": text} for i, text in enumerate(english)]
    queries = [{"_id": f"q{i}", "text": text[:60]} for i, text in enumerate(english[:10])]
    queries.append({"_id": "unjudged", "text": "nobody knows"})
    rows = ["query-id\tcorpus-id\tscore", *(f"q{i}\tp{i}\t1" for i in range(10)), "unjudged\tp0\t0"]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_beir_folder_is_read(folder: Path) -> None:
    dataset = read_beir(folder)
    assert len(dataset.corpus) == 30
    assert dataset.corpus["p0"].startswith("T ")
    assert not dataset.corpus["p1"].startswith(" ")
    assert len(dataset.queries) == 11
    assert list(dataset.judged_queries()) == [f"q{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus.jsonl", '{"_id": "a", "text": "t"}\n{"_id": 5, "text": "t"}\n', "line 2: not an object"),
        ("corpus.jsonl", '{"_id": "a"}\n', "line 1: title and text"),
        ("corpus.jsonl", '{"_id": "a\\ud83d", "text": "t"}\n', "line 1: an id contains NUL or a lone"),
        ("queries.jsonl", '{"_id": "a\\u0000b", "text": "t"}\n', "line 1: an id contains NUL"),
        ("qrels/test.tsv", "q\tp\0\t1\n", "line 1: an id contains NUL"),
        ("corpus.jsonl", "\n{\n", "line 2: not valid JSON"),
        ("corpus.jsonl", '{"_id": "a", "m": ' + "[" * 100_000 + "\n", "line 1: not valid JSON"),
        ("queries.jsonl", '{"_id": "a"}\n', "line 1: text must"),
        ("queries.jsonl", '{"_id": "a", "text": "t"}\n', "no relevant passage"),
        (
            "corpus.jsonl",
            '{"_id": "a", "text": "t"}\n{"_id": "a", "text": "u"}\n',
            "line 2: `_id` already used",
        ),
        ("qrels/test.tsv", "q\tp\n", "line 1: not"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\tp\tmuch\n", "line 2: not"),
        ("qrels/test.tsv", "q\tp\t1\nquery-id\tcorpus-id\tscore\n", "line 2: not"),
        ("qrels/test.tsv", "q0\tp99\t1\nq1\tp98\t1\n", "none of the relevant passages in .*another data set"),
    ],
)
def test_a_malformed_dataset_is_reported_by_file_and_line(
    folder: Path, name: str, text: str, message: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_beir(folder)


def test_a_passage_judged_more_than_once_counts_with_its_highest_grade(folder: Path) -> None:
    rows = ["q0\tp0\t1", "q0\tp0\t1", "q0\tp1\t2", "q0\tp1\t0", "q1\tp0\t0", "q1\tp0\t3", "q2\tp0\t1"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n")
    dataset = read_beir(folder)
    assert dataset.qrels == {"q0": {"p0": 1, "p1": 2}, "q1": {"p0": 3}, "q2": {"p0": 1}}
    assert (dataset.num_repeated, dataset.num_conflicting) == (3, 2)
    with pytest.raises(DatasetError, match="line 2: passage judged twice"):
        read_beir(folder, strict=True)


def test_a_missing_or_undecodable_file_is_reported(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"train\.tsv cannot be read"):
        read_beir(folder, "train")
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q", "text": "' + b"x" * 20_000 + b'"}\n\n{"\xff"}\n')
    with pytest.raises(DatasetError, match=r"queries\.jsonl, line 3: not UTF-8"):
        read_beir(folder)
    (folder / "queries.jsonl").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DatasetError, match=r"queries\.jsonl is compressed with gzip; unpack it"):
        read_beir(folder)


def test_relevant_passages_that_the_corpus_lacks_are_counted(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_text(
        "\n\nquery-id\tcorpus-id\tscore\nq0\tp0\t1\nq0\tp99\t2\nq1\tp98\t0\n"
    )
    dataset = read_beir(folder)
    assert (dataset.num_unknown_passages(), dataset.num_relevant()) == (1, 2)


def test_a_run_survives_writing_and_reading(tmp_path: Path) -> None:
    run = {"q1": {"b": 0.1 + 0.2, "a": -3.5}, "q2": {"c": 1e-9}}
    path = tmp_path / "run.trec"
    path.write_text("".join(format_run(run, "tag")))
    assert read_run(path) == run
    assert list(read_run(path)["q1"]) == ["b", "a"]
    assert path.read_text().splitlines()[0].split() == ["q1", "Q0", "b", "1", repr(0.1 + 0.2), "tag"]


@pytest.mark.parametrize("run", [{"a query": {"d": 1.0}}, {"q": {"a passage": 1.0}}, {"q": {"": 1.0}}])
def test_an_id_that_a_run_cannot_hold_is_refused(run: dict[str, dict[str, float]]) -> None:
    with pytest.raises(DatasetError, match="white space"):
        list(format_run(run, "tag"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 a 1 2.0\n", "line 1: not"),
        ("q Q0 a 1 high tag\n", "line 1: not"),
        ("q Q0 a 1 nan tag\n", "line 1: not"),
        ("q Q0 a\0 1 2.0 tag\n", "line 1: an id contains NUL"),
        ("\nq Q0 a 1 2 t\nq Q0 a 2 1 t\n", "line 3: passage listed twice"),
    ],
)
def test_a_malformed_run_is_reported_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_run(tmp_path / "run")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(folder: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = folder / name
        path.write_text(path.read_text() + "\n", encoding="utf-8-sig")
    assert len(read_beir(folder).judged_queries()) == 10


def test_a_corpus_without_words_is_reported() -> None:
    for corpus in ({}, {"a": "? !"}):
        with pytest.raises(DatasetError, match="no words"):
            Bm25(corpus)


def test_a_run_of_another_data_set_is_reported(scorer: Scorer, folder: Path) -> None:
    dataset = read_beir(folder)
    with pytest.raises(DatasetError, match="no passage for any judged query"):
        evaluate(scorer, dataset, {"other": {"p1": 1.0}}, 10, progress=False)
    report = evaluate(scorer, dataset, {"q0": {"p0": 1.0}}, 10, progress=False)
    assert report.num_unanswered == 9
    assert report.after["MRR@10"] == pytest.approx(0.1)


def test_bm25_finds_the_passage_of_its_own_words() -> None:
    search = Bm25({"a": "the cat sat on the mat", "b": "dogs bark at night", "c": "the the the"})
    run = search.search({"q": "bark at a dog", "nothing": "zebra"}, depth=10)
    assert list(run["q"]) == ["b"]
    assert run["nothing"] == {}
    assert search.search({}, 5) == {}
    assert "c" in search.search({"q": "the"}, 5)["q"]  # stop words count


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("大熊猫吃什么", "panda"),
        ("竹子", "panda"),
        ("ジャイアントパンダ", "katakana"),
        ("Python 编程", "python"),
        ("機械学習とは", "learning"),
    ],
)
def test_bm25_finds_chinese_and_japanese(query: str, best: str) -> None:
    corpus = {
        "tea": "绿茶是一种热饮料。",
        "panda": "大熊猫是一种熊，主要吃竹子。",
        "katakana": "パンダは笹を食べる。",
        "python": "Python是一种编程语言。",
        "learning": "機械学習は人工知能の一分野である。",
    }
    assert next(iter(Bm25(corpus).search({"q": query}, 5)["q"])) == best


def test_reranking_few_passages_changes_the_order_of_these_only(scorer: Scorer, folder: Path) -> None:
    dataset = read_beir(folder)
    first = Bm25(dataset.corpus).search(dataset.judged_queries(), 20)
    few = evaluate(scorer, dataset, first, 3, progress=False)
    many = evaluate(scorer, dataset, first, 20, progress=False)
    for name in ("nDCG@10", "MRR@10", "MAP"):
        assert few.before[name] == many.before[name], "the first stage is the same"
    assert few.curve == {0: few.before["nDCG@10"], 2: many.curve[2], 3: few.after["nDCG@10"]}
    assert few.after["R@3"] == few.before["R@3"]
    same = evaluate(scorer, dataset, first, 3, compared=("same", first), progress=False)
    assert same.compared is not None
    assert same.compared.means == same.before


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_plot_takes_any_title_and_name(
    scorer: Scorer, folder: Path, tmp_path: Path, suffix: str, recwarn: pytest.WarningsRecorder
) -> None:
    dataset = read_beir(folder)
    first = Bm25(dataset.corpus).search(dataset.judged_queries(), 20)
    report = evaluate(scorer, dataset, first, 10, compared=(r"_a$\frac{$", first), progress=False)
    path = tmp_path / f"plot{suffix}"
    plot_report(report, path, title="price_$5_to_$10 熊猫")
    assert path.stat().st_size > 1000
    assert not [each for each in recwarn if "Glyph" in str(each.message)]
    if suffix == ".svg":
        assert "_a$" in path.read_text(encoding="utf-8")


def test_a_plot_that_cannot_be_written_is_reported(scorer: Scorer, folder: Path, tmp_path: Path) -> None:
    dataset = read_beir(folder)
    report = evaluate(scorer, dataset, {"q0": {"p0": 1.0}}, 10, progress=False)
    with pytest.raises(DatasetError, match="suffix must be one of"):
        plot_report(report, tmp_path / "plot.pgf", title="needs TeX")
    path = tmp_path / "plot.png"
    path.mkdir()
    with pytest.raises(DatasetError, match=r"cannot be written to .*: Is a directory"):
        plot_report(report, path, title="x")


def test_a_run_is_reranked_by_the_scorer(scorer: Scorer, folder: Path) -> None:
    dataset = read_beir(folder)
    first = Bm25(dataset.corpus).search(dataset.judged_queries(), 8)
    reranked = rerank_run(scorer, dataset.queries, dataset.corpus, first)
    assert reranked.num_pairs == sum(map(len, first.values()))
    for query_id, scores in reranked.run.items():
        assert set(scores) == set(first[query_id])
        expected = scorer.rank(dataset.queries[query_id], [dataset.corpus[p] for p in first[query_id]])
        assert list(scores.values()) == pytest.approx([p.score for p in expected], abs=1e-5)


def test_ids_that_are_not_there_are_reported(scorer: Scorer) -> None:
    with pytest.raises(DatasetError, match="query that the queries lack: id 'q'"):
        rerank_run(scorer, {}, {"a": "text"}, {"q": {"a": 1.0}})
    with pytest.raises(DatasetError, match="passage that the corpus lacks: id 'b'"):
        rerank_run(scorer, {"q": "text"}, {"a": "text"}, {"q": {"a": 1.0, "b": 0.5}})


@pytest.mark.parametrize("normalize", [False, True])
def test_blank_passages_are_reranked_last(checkpoint: Path, normalize: bool) -> None:
    corpus = {"x": "", "a": "a bear", "y": " \n", "b": "a car"}
    first = {"q": {name: float(-rank) for rank, name in enumerate(corpus)}, "none": {}}
    with Scorer(checkpoint, device="cpu", dtype="float32", normalize=normalize) as scorer:
        queries = {"q": "panda", "none": " "}  # a blank query without passages needs no scores
        reranked = rerank_run(scorer, queries, corpus, first).run
        assert list(reranked) == ["q", "none"]
        assert list(reranked["q"])[2:] == ["x", "y"]
        assert reranked["none"] == {}
        curve = reranked_to_depth(first, reranked, 3)
        assert list(sorted_run(curve["q"])) == ["a", "x", "y", "b"]
        with pytest.raises(DatasetError, match=r"query 'q' cannot be reranked: .*is blank"):
            rerank_run(scorer, {"q": " "}, corpus, {"q": first["q"]})


def test_equal_scores_keep_the_rerankers_order_at_every_depth() -> None:
    first = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    rounded = {"q": {"c": 1.0, "b": 1.0, "a": 1.0}}
    orders = [list(sorted_run(reranked_to_depth(first, rounded, depth)["q"])) for depth in (1, 2, 3)]
    assert orders == [["a", "b", "c"], ["b", "a", "c"], ["c", "b", "a"]]


def test_an_evaluation_adds_up(scorer: Scorer, folder: Path, tmp_path: Path) -> None:
    dataset = read_beir(folder)
    first = Bm25(dataset.corpus).search(dataset.judged_queries(), 20)
    report = evaluate(scorer, dataset, first, 10, progress=False)
    assert report.before["nDCG@10"] == pytest.approx(1)  # each query is the beginning of its passage
    changes = [change.after - change.before for change in report.changes]
    assert sum(changes) / 10 == pytest.approx(report.intervals["nDCG@10"].mean)
    assert report.after["nDCG@10"] - report.before["nDCG@10"] == pytest.approx(sum(changes) / 10)
    assert list(report.curve) == [0, 2, 5, 10]
    assert report.curve[0] == pytest.approx(report.before["nDCG@10"])
    assert report.curve[10] == pytest.approx(report.after["nDCG@10"])
    assert report.after["R@10"] == report.before["R@10"]
    assert report.num_pairs == sum(min(10, len(scores)) for scores in first.values())
    assert report.num_tokens > report.num_pairs
    hurt = report.hurt(3)
    assert [c.after - c.before for c in hurt] == sorted(c.after - c.before for c in hurt)
    assert report.helped(3) == []
    plot_report(report, tmp_path / "plot.png", title="test")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DatasetError, match="cannot be written"):
        plot_report(report, tmp_path / "plot.nonsense", title="test")


def test_measures_do_not_need_what_python_3_14_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Num", "Str", "NameConstant"):
        monkeypatch.delattr(ast, name, raising=False)
    values = measure({"q": {"a": 1}}, {"q": {"b": 2.0, "a": 1.0}}, ["MRR@10", "MAP", "R@1"])
    assert values == {"MRR@10": {"q": 0.5}, "MAP": {"q": 0.5}, "R@1": {"q": 0.0}}


def test_a_model_compared_with_itself_reaches_all_of_it(scorer: Scorer, folder: Path, tmp_path: Path) -> None:
    dataset = read_beir(folder)
    first = Bm25(dataset.corpus).search(dataset.judged_queries(), 8)
    own = rerank_run(scorer, dataset.queries, dataset.corpus, first).run
    report = evaluate(scorer, dataset, first, 8, compared=("itself", own), progress=False)
    assert report.compared is not None
    assert report.compared.means == report.after
    assert set(report.compared.shares.values()) == {1.0}
    assert set(report.compared.intervals.values()) == {(0.0, 0.0, 0.0)}
    plot_report(report, tmp_path / "plot.svg", title="test")
    assert "itself" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_a_comparison_is_over_the_passages_that_are_reranked(scorer: Scorer, folder: Path) -> None:
    dataset = read_beir(folder)
    first = {f"q{i}": {f"p{i}": 2.0, "p20": 1.0, "p21": 0.5} for i in range(9)}  # no passage for q9
    # This run ranks the relevant passage first among those that are reranked, but others rank even higher.
    other = {f"q{i}": {"p21": 9.0, "p29": 8.0, f"p{i}": 7.0, "p20": 6.0} for i in range(9)}
    report = evaluate(scorer, dataset, first, 2, compared=("other", other), progress=False)
    assert report.compared is not None
    assert report.compared.means["MRR@10"] == pytest.approx(0.9)
    assert report.compared.shares["MRR@10"] == pytest.approx(report.after["MRR@10"] / 0.9)
    assert report.compared.intervals["MRR@10"].mean == pytest.approx(report.after["MRR@10"] - 0.9)
    never = {f"q{i}": {f"p{i}": 1.0, "p20": 2.0} for i in range(9)}
    first = {query_id: {"p20": 1.0} for query_id in first}
    report = evaluate(scorer, dataset, first, 2, compared=("never", never), progress=False)
    assert report.compared is not None
    assert set(report.compared.shares.values()) == {None}, "a share of 0 is undefined"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q3": {}}, "the compared run 'other' lacks a query of the first stage: id 'q3'"),
        (
            {"q3": {"p3": 1.0}},
            "the compared run 'other' lacks a passage of the first stage: id 'p20', for query 'q3'",
        ),
    ],
)
def test_a_compared_run_that_lacks_something_is_refused_before_any_scoring(
    scorer: Scorer, folder: Path, change: dict[str, dict[str, float]], message: str
) -> None:
    first = {f"q{i}": {f"p{i}": 2.0, "p20": 1.0} for i in range(10)}
    scored = scorer.stats().pairs
    with pytest.raises(DatasetError, match=message):
        evaluate(scorer, read_beir(folder), first, 2, compared=("other", {**first, **change}), progress=False)
    assert scorer.stats().pairs == scored


def test_queries_without_a_relevant_passage_do_not_count() -> None:
    dataset = BeirDataset(
        corpus={"a": "x"}, queries={"q": "x", "r": "x"}, qrels={"q": {"a": 1}, "r": {"a": 0}}
    )
    assert list(dataset.judged_queries()) == ["q"]


@pytest.mark.parametrize("grade", ["1001", "-1001", "4294967296", "99999999999999999999"])
def test_grades_that_mean_nothing_are_refused(grade: str, folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_text(f"q1\tp1\t{grade}\n")
    with pytest.raises(DatasetError, match="line 1: the grade is not from -1000 to 1000"):
        read_beir(folder)


def test_negative_grades_are_not_relevant() -> None:
    """pytrec_eval may crash if all grades of a query are -2 or less."""
    code = """
        from bge_rerank_integrations.evaluation.measures import measure
        judged = {"relevant": {"p0": 3}, "harmful": {f"p{number}": -3 for number in range(5)}}
        run = {"relevant": {"p0": 1.0}, "harmful": {f"p{number}": -number for number in range(40)}}
        for _ in range(300):
            values = measure(judged, run, ("nDCG@10", "MAP", "MRR@10"))
        assert all(each == {"relevant": 1.0, "harmful": 0.0} for each in values.values()), values
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=200)


def test_the_best_passages_of_a_run_are_reranked_whatever_their_order(scorer: Scorer) -> None:
    dataset = BeirDataset(
        corpus={"a": "one", "b": "two", "c": "three"},
        queries={"q": "which?"},
        qrels={"q": {"a": 1}},
        num_repeated=0,
        num_conflicting=0,
    )
    report = evaluate(scorer, dataset, {"q": {"b": 1.0, "c": 2.0, "a": 9.0}}, 2, progress=False)
    assert report.before["R@2"] == 1
