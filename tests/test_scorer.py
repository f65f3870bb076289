from __future__ import annotations

import asyncio
import copy
import errno
import gc
import io
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bge_rerank_integrations import RankedPassage, Ranking, Scorer, ScorerConfig, SupportsRank
from bge_rerank_integrations.engine.packing import PackedBatch
from bge_rerank_integrations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DeviceError,
    InputError,
    InputTypeError,
    NonFiniteScoreError,
    QueueFullError,
    ScorerClosedError,
)
from bge_rerank_integrations.ranking import sigmoid
from bge_rerank_integrations.runtime import warn_once
from bge_rerank_integrations.runtime.progress import progress_bar
from bge_rerank_integrations.text.tokenization import EncodedPair, PairTokenizer
from tests.support.engine import score_all
from tests.support.queues import PATIENCE_S, wait_until
from tests.support.tolerances import LOGIT_TOLERANCE

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
QUERY = "what does a giant panda eat?"


@pytest.fixture
def shared_config(checkpoint: Path) -> Iterator[ScorerConfig]:
    """Return a config. Its shared scorer is closed after the test."""
    config = ScorerConfig(model=str(checkpoint), device="cpu", dtype="float32", max_length=128)
    yield config
    Scorer.shared(config).close()


def test_scores_are_raw_python_floats_in_order(scorer: Scorer, texts: list[str]) -> None:
    pairs = [(QUERY, text) for text in texts]
    scores = scorer.score(pairs)
    assert [type(score) for score in scores] == [float] * len(texts)
    assert min(scores) < 0
    assert scores == pytest.approx([scorer.score([pair])[0] for pair in pairs], abs=TOLERANCE)


def test_scores_are_those_of_transformers(scorer: Scorer, plain_model: Any, texts: list[str]) -> None:
    """Compares the whole way from text to score, with passages truncated by `truncation="only_second"`."""
    from transformers import PreTrainedTokenizerFast

    plain: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(Path(scorer.config.model) / "tokenizer.json")
    )
    passages = [*texts[:20], " ".join(texts)]
    with torch.inference_mode():
        expected = [
            plain_model(
                **plain(QUERY, text, truncation="only_second", max_length=512, return_tensors="pt", return_token_type_ids=False)
            ).logits.item()
            for text in passages
        ]  # fmt: skip
    assert scorer.score([(QUERY, text) for text in passages]) == pytest.approx(expected, abs=TOLERANCE)


def test_compute_score_takes_a_pair_or_a_list(scorer: Scorer) -> None:
    pair = ("panda", "A bear.")
    (raw,) = scorer.score([pair])
    assert scorer.compute_score(pair) == [raw]
    assert scorer.compute_score(list(pair)) == [raw]  # type: ignore[arg-type]
    assert scorer.compute_score([pair]) == [raw]
    assert scorer.compute_score([pair, pair], normalize=True) == [sigmoid(raw)] * 2
    assert scorer.compute_score([]) == []
    assert scorer.compute_score(each for each in (pair, pair)) == [raw, raw]
    with pytest.raises(InputTypeError, match="normalize must be True, False or None"):
        scorer.compute_score(pair, normalize="no")  # type: ignore[arg-type]


def test_normalize(checkpoint: Path, scorer: Scorer, texts: list[str]) -> None:
    pairs = [(QUERY, text) for text in texts[:5]]
    with Scorer(checkpoint, device="cpu", dtype="float32", normalize=True) as normalizing:
        assert normalizing.score(pairs) == [sigmoid(score) for score in scorer.score(pairs)]
        assert normalizing.compute_score(pairs, normalize=False) == scorer.score(pairs)


def test_rank(scorer: Scorer, texts: list[str]) -> None:
    scores = scorer.score([(QUERY, text) for text in texts])
    ranking = scorer.rank(QUERY, texts)
    assert [p.index for p in ranking] == sorted(range(len(texts)), key=lambda i: -scores[i])
    assert [p.score for p in ranking] == pytest.approx(sorted(scores, reverse=True), abs=TOLERANCE)
    assert ranking.num_pairs == len(texts)
    assert ranking.num_truncated == 0
    assert ranking.num_tokens > 20 * len(texts)


@pytest.mark.parametrize("top_n", [None, 0, 1, 3, 1000])
def test_top_n(scorer: Scorer, texts: list[str], top_n: int | None) -> None:
    everything = scorer.rank(QUERY, texts)
    ranking = scorer.rank(QUERY, texts, top_n)
    assert ranking == everything[:top_n]
    assert ranking.num_pairs == len(texts)
    assert scorer.rank_many([(QUERY, texts)], top_n)[0] == everything[:top_n]


def test_the_threshold_is_inclusive(scorer: Scorer, texts: list[str]) -> None:
    everything = scorer.rank(QUERY, texts)
    assert scorer.rank(QUERY, texts, threshold=everything[4].score) == everything[:5]
    assert scorer.rank(QUERY, texts, 2, everything[4].score) == everything[:2]
    assert scorer.rank(QUERY, texts, threshold=1e9) == []


def test_equal_passages_score_equally_and_keep_their_order(scorer: Scorer, texts: list[str]) -> None:
    passages = [texts[0], texts[1], texts[0], texts[2], texts[0]]
    ranking = scorer.rank(QUERY, passages)
    same = [p for p in ranking if p.index in (0, 2, 4)]
    assert [p.index for p in same] == [0, 2, 4]
    assert len({p.score for p in same}) == 1


def test_permuted_passages_get_the_same_scores(scorer: Scorer, texts: list[str]) -> None:
    by_text = {texts[p.index]: p.score for p in scorer.rank(QUERY, texts)}
    permuted = list(np.random.default_rng(0).permutation(texts))
    for passage in scorer.rank(QUERY, permuted):
        assert passage.score == pytest.approx(by_text[permuted[passage.index]], abs=TOLERANCE)


def test_rank_many(scorer: Scorer, texts: list[str]) -> None:
    requests = [("panda", texts[:7]), ("mercury", []), ("python", texts[3:9]), ("panda", texts[:2])]
    rankings = scorer.rank_many(requests)
    assert [len(ranking) for ranking in rankings] == [7, 0, 6, 2]
    for ranking, (query, passages) in zip(rankings, requests, strict=True):
        alone = scorer.rank(query, passages)
        assert [p.index for p in ranking] == [p.index for p in alone]
        assert [p.score for p in ranking] == pytest.approx([p.score for p in alone], abs=TOLERANCE)
        assert (ranking.num_pairs, ranking.num_tokens) == (alone.num_pairs, alone.num_tokens)


def test_no_pairs_give_no_scores(scorer: Scorer) -> None:
    assert scorer.score([]) == []
    assert scorer.rank(QUERY, []) == Ranking()
    assert scorer.rank_many([]) == []


def test_iterators_are_accepted(scorer: Scorer, texts: list[str]) -> None:
    assert scorer.score((QUERY, text) for text in texts[:3]) == scorer.score([(QUERY, t) for t in texts[:3]])
    assert scorer.rank(QUERY, tuple(texts[:3])) == scorer.rank(QUERY, texts[:3])


def test_an_iterator_is_read_as_it_is_scored(scorer: Scorer, texts: list[str]) -> None:
    queries = [f"{number} {text[:12]}" for number in range(150) for text in texts]
    pairs = [(query, "a panda") for query in queries]
    assert len(pairs) > 2 * 4096
    done_when_read: list[int] = []

    def generate() -> Iterator[tuple[str, str]]:
        before = scorer.stats().pairs
        for pair in pairs:
            done_when_read.append(scorer.stats().pairs - before)
            yield pair

    streamed = scorer.score(generate())
    assert streamed == pytest.approx(scorer.score(pairs), abs=TOLERANCE)
    ahead = [read - done for read, done in enumerate(done_when_read, start=1)]
    assert max(ahead) <= 2 * 4096


def test_a_stream_ends_at_a_malformed_pair_with_its_index(scorer: Scorer) -> None:
    good = [("panda", str(number)) for number in range(4100)]
    with pytest.raises(InputTypeError, match="pair 4100 ") as caught:
        scorer.score(iter([*good, ("panda", 5), ("panda", "x")]))  # type: ignore[arg-type]
    assert caught.value.index == 4100
    assert scorer.health().queued_requests == 0


def test_an_iterator_waits_for_its_own_pairs_if_the_queue_is_full(checkpoint: Path) -> None:
    pairs = [("panda", str(number)) for number in range(9000)]
    with Scorer(checkpoint, device="cpu", dtype="float32", max_queued_tokens=40_000) as scorer:
        assert len(scorer.score(iter(pairs))) == 9000
        with pytest.raises(QueueFullError):
            scorer.score(pairs)


def test_an_iterator_whose_first_part_can_never_fit_the_queue_is_refused(checkpoint: Path) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", max_queued_tokens=1000) as scorer:
        with pytest.raises(QueueFullError):
            scorer.score(("panda", str(number)) for number in range(9000))
        assert (scorer.health().queued_requests, scorer.health().queued_tokens) == (0, 0)


def test_truncation_is_reported(scorer: Scorer, texts: list[str]) -> None:
    ranking = scorer.rank(QUERY, [texts[0], " ".join(texts), texts[1]])
    assert {p.index: p.truncated for p in ranking} == {0: False, 1: True, 2: False}
    assert (ranking.num_truncated, ranking.num_truncated_queries) == (1, 0)
    cut = scorer.rank("panda " * 2000, ["short", " ".join(texts)])
    assert {p.index: p.truncated for p in cut} == {0: False, 1: True}
    assert (cut.num_truncated, cut.num_truncated_queries) == (1, 1)
    whole, cut = scorer.rank_many([(QUERY, ["short"]), ("panda " * 2000, ["short", "shorter"])])
    assert (whole.num_truncated_queries, cut.num_truncated_queries) == (0, 1)


def test_truncated_queries_are_counted_once_per_request_and_logged_once(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warn_once, "_logged", {})
    question = "CANARY which animal eats bamboo? " * 40
    with Scorer(checkpoint, device="cpu", dtype="float32", max_length=64) as scorer:
        scorer.rank(QUERY, ["a", "b"])
        assert (scorer.stats().query_truncations, caplog.messages) == (0, [])
        scorer.rank(question, ["a", "b", "c"])
        scorer.rank_many([(question, ["a"]), (question, ["b"]), (QUERY, ["a"]), ("other " * 200, ["a"])])
        scorer.score([(question, "a"), (question, "b")])
        assert (scorer.stats().query_truncations, scorer.stats().truncations) == (4, 0)
        assert scorer.stats().to_dict()["query_truncations"] == 4
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "query_max_length=48" in message
    assert "query_truncation_side" in message
    assert "CANARY" not in message


def test_the_end_of_a_long_query_counts_with_left_truncation(checkpoint: Path, texts: list[str]) -> None:
    history = "tell me about the planet mercury " * 40
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_length": 64}
    with Scorer(checkpoint, **settings, query_truncation_side="left") as scorer:
        ranking = scorer.rank(history + QUERY, texts)
        assert [p.index for p in ranking] != [p.index for p in scorer.rank(history + "other end", texts)]
        assert ranking.num_truncated_queries == 1
        assert scorer.rank(QUERY, texts).num_truncated_queries == 0
    with Scorer(checkpoint, **settings) as scorer:
        assert scorer.rank(history + QUERY, texts) == scorer.rank(history + "another end", texts)


BLANKS = ["", "  \n\x0c", "\u200b\xad", "\0"]


def test_blank_passages_come_last_unscored_and_marked(scorer: Scorer, texts: list[str]) -> None:
    passages = [BLANKS[0], texts[0], BLANKS[1], texts[1], BLANKS[2], BLANKS[3], texts[2], BLANKS[0]]
    before = scorer.stats()
    ranking = scorer.rank(QUERY, passages)
    after = scorer.stats()
    assert sorted(p.index for p in ranking[:3]) == [1, 3, 6]
    alone = scorer.rank(QUERY, texts[:3])
    assert [p.score for p in ranking[:3]] == pytest.approx([p.score for p in alone], abs=TOLERANCE)
    assert [(p.index, p.score, p.blank, p.windows) for p in ranking[3:]] == [
        (index, -65504.0, True, 0) for index in (0, 2, 4, 5, 7)
    ]
    assert not any(p.blank for p in ranking[:3])
    assert (ranking.num_pairs, ranking.num_blank) == (3, 5)
    assert ranking.num_tokens == alone.num_tokens
    assert (after.pairs - before.pairs, after.blank_passages - before.blank_passages) == (3, 5)
    assert after.duplicates == before.duplicates
    assert scorer.rank(QUERY, passages, 4) == ranking[:4]
    assert scorer.rank(QUERY, passages, threshold=-1e9) == ranking[:3]
    assert [p.index for p in scorer.rank(QUERY, BLANKS)] == [0, 1, 2, 3]
    many = scorer.rank_many([(QUERY, passages), (QUERY, []), (QUERY, BLANKS)])
    assert [[p.index for p in each] for each in many] == [[p.index for p in ranking], [], [0, 1, 2, 3]]
    assert [each.num_blank for each in many] == [5, 0, 4]


async def test_async_methods_handle_blank_texts_alike(scorer: Scorer, texts: list[str]) -> None:
    passages = ["", texts[0], "\n", texts[1]]
    expected = [p.index for p in scorer.rank(QUERY, passages)]
    assert [p.index for p in await scorer.arank(QUERY, passages)] == expected
    (ranking,) = await scorer.arank_many([(QUERY, passages)])
    assert [(p.index, p.blank) for p in ranking] == [(index, index in (0, 2)) for index in expected]
    with pytest.raises(InputError, match="query is blank"):
        await scorer.arank(" ", passages)


def test_a_text_that_only_the_tokenizer_finds_blank(checkpoint: Path) -> None:
    """U+FFFD is a visible character, but the tokenizer of the embedded model drops it."""
    with Scorer("embedded", device="cpu", dtype="float32") as scorer:
        assert [p.blank for p in scorer.rank(QUERY, ["\ufffd", "panda"])] == [False, True]
        with pytest.raises(InputError, match=r"^the query is blank$") as caught:
            scorer.rank("\ufffd\ufffd", ["panda"])
        assert caught.value.index is None
        with pytest.raises(InputError, match=r"^request 1: the query is blank$") as caught:
            scorer.rank_many([(QUERY, ["panda"]), ("\ufffd", ["panda"])])
        assert caught.value.index == 1
        assert scorer.stats().requests == 1, "nothing is begun for what is refused"


@pytest.mark.parametrize(
    "settings", [{}, {"max_length": 64, "long_passages": "windows", "window_overlap_tokens": 4}]
)
def test_an_instruction_does_not_make_a_blank_passage_readable(
    checkpoint: Path, texts: list[str], settings: dict[str, Any]
) -> None:
    with Scorer(
        checkpoint, device="cpu", dtype="float32", passage_instruction="passage: ", normalize=True, **settings
    ) as scorer:
        ranking = scorer.rank(QUERY, ["", texts[0], " "])
        assert [(p.index, p.blank) for p in ranking] == [(1, False), (0, True), (2, True)]
        assert [p.score for p in ranking[1:]] == [0.0, 0.0]
        assert scorer.rank(QUERY, ["", texts[0], " "], threshold=1e-300) == ranking[:1]


async def test_blank_passages_can_be_refused(checkpoint: Path, texts: list[str]) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", blank_passages="refuse") as scorer:
        for call in (
            lambda: scorer.rank(QUERY, [texts[0], texts[1], "\n"]),
            lambda: scorer.rank_many([(QUERY, texts), (QUERY, [texts[0]]), (QUERY, ["a", "\u200b"])]),
        ):
            with pytest.raises(InputError, match=r"is blank.*blank_passages='last'") as caught:
                call()
            assert caught.value.index == 2
        with pytest.raises(InputError, match="passage 0 is blank"):
            await scorer.arank(QUERY, ["", "a"])
        assert scorer.stats().requests == 0
        assert len(scorer.rank(QUERY, texts)) == len(texts)


def test_pairs_with_blank_texts_are_scored(scorer: Scorer) -> None:
    """`FlagReranker.compute_score` scores blank texts too. Only a ranking has a last place for them."""
    pairs = [("", "passage"), ("query", " "), ("", "")]
    assert scorer.score(pairs) == pytest.approx(scorer.compute_score(pairs), abs=TOLERANCE)
    assert len(set(scorer.score(pairs))) == 3


def test_blank_passages_are_logged_once(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warn_once, "_logged", {})
    with (
        Scorer(checkpoint, device="cpu", dtype="float32") as first,
        Scorer(checkpoint, device="cpu", dtype="float32", max_length=64) as second,
    ):
        first.rank(QUERY, ["CANARY", "text"])
        assert caplog.messages == []
        for scorer in (first, second, first):
            scorer.rank(QUERY, ["CANARY", "", "text"])
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "1 of the 3 passages" in message
    assert "CANARY" not in message


@pytest.fixture(scope="module")
def steep_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with logits so large that the sigmoid rounds most of them to 0 or 1."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("steep") / "model"))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["classifier.out_proj.weight"] *= 1000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_length": 32, "query_max_length": 12, "long_passages": "windows", "window_overlap_tokens": 4}],
)
def test_logits_decide_where_the_sigmoid_rounds_scores_together(
    steep_checkpoint: Path, texts: list[str], settings: dict[str, Any]
) -> None:
    with Scorer(steep_checkpoint, device="cpu", dtype="float32", **settings) as raw:
        logits = {p.index: p.score for p in raw.rank(QUERY, texts)}
        assert max(logits.values()) > 100
    with Scorer(steep_checkpoint, device="cpu", dtype="float32", normalize=True, **settings) as scorer:
        ranking = scorer.rank(QUERY, texts)
        assert len({p.score for p in ranking}) < len(texts) - 3
        assert [p.index for p in ranking] == list(logits)
        assert [p.index for p in scorer.rank(QUERY, texts, 3)] == list(logits)[:3]
        assert [p.index for p in scorer.rank_many([(QUERY, texts)])[0]] == list(logits)
        at_one = [p.index for p in ranking if p.score == 1.0]
        assert len(at_one) > 1
        assert [p.index for p in scorer.rank(QUERY, texts, threshold=1.0)] == at_one


@pytest.mark.parametrize("threshold", [0, -2, 1.5, 50])
async def test_a_threshold_off_the_scale_is_refused(checkpoint: Path, threshold: float) -> None:
    with Scorer(checkpoint, device="cpu", dtype="float32", normalize=True) as scorer:
        with pytest.raises(InputError, match=r"above 0 and at most 1.*normalize=False"):
            scorer.rank(QUERY, ["a"], threshold=threshold)
        with pytest.raises(InputError, match="above 0 and at most 1"):
            await scorer.arank(QUERY, ["a"], threshold=threshold)
        with pytest.raises(InputError, match="above 0 and at most 1"):
            scorer.rank_many([(QUERY, ["a"])], threshold=threshold)


def test_the_best_window_gives_the_score(checkpoint: Path, texts: list[str]) -> None:
    passage = " ".join(texts)
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_length": 128,
        "query_max_length": 32,
    }
    with Scorer(checkpoint, **settings, long_passages="windows", window_overlap_tokens=16) as windowed:
        (best,) = windowed.rank(QUERY, [passage])
        engine = windowed._require_pipeline()
        (pair,) = engine.tokenizer.encode([QUERY], [passage])
        assert best.windows == len(pair.windows) > 10
        assert best.score == pytest.approx(
            max(score_all(engine.runners[0], list(pair.windows))), abs=TOLERANCE
        )
        assert not best.truncated
    with Scorer(checkpoint, **settings) as cutting:
        (cut,) = cutting.rank(QUERY, [passage])
        assert (cut.windows, cut.truncated) == (1, True)
        assert best.score >= cut.score - TOLERANCE


def test_every_length_stays_within_the_positions(scorer: Scorer) -> None:
    rankings = scorer.rank_many([("q", ["a " * n]) for n in range(1, 601)])
    shortest, per_word = rankings[0].num_tokens, rankings[1].num_tokens - rankings[0].num_tokens
    for number, ranking in enumerate(rankings):
        whole = shortest + number * per_word
        assert ranking.num_tokens == min(whole, 512)
        assert ranking[0].truncated == (whole > 512)


BAD_CALLS = [
    (lambda s: s.score([("q", "p"), ("q", None)]), "the passage of pair 1 must be a string, not NoneType", 1),
    (lambda s: s.score([(3, "p")]), "the query of pair 0 must be a string, not int", 0),
    (lambda s: s.score(["secret", "passage"]), "pair 0 must be a .query, passage. tuple, not str", 0),
    (lambda s: s.score([("q", "p"), ("a", "b", "c")]), "pair 1 .* not tuple of 3", 1),
    (lambda s: s.score("secret"), "pairs must be a list", None),
    (lambda s: s.score(None), "pairs must be a list", None),
    (lambda s: s.score(["ab"]), "pair 0 must be a .query, passage. tuple, not str", 0),
    (lambda s: s.score([{"q": 1, "p": 2}]), "pair 0 must be a .query, passage. tuple, not dict", 0),
    (lambda s: s.rank("q", 5), "passages must be a sequence of strings, not int", None),
    (lambda s: s.rank("q", None), "passages must be a sequence of strings, not NoneType", None),
    (lambda s: s.rank(None, ["p"]), "the query must be a string, not NoneType", None),
    (lambda s: s.rank(b"q", []), None, None),
    (lambda s: s.rank("q", "secret"), "passages must be a sequence of strings, not str", None),
    (lambda s: s.rank("q", b"secret"), "passages must be a sequence of strings, not bytes", None),
    (lambda s: s.rank("q", {"title": "secret"}), "passages must be a sequence of strings, not dict", None),
    (lambda s: s.rank("q", ["p", b"secret"]), "passage 1 must be a string, not bytes", 1),
    (lambda s: s.rank("q", [float("nan")]), "passage 0 must be a string, not float", 0),
    (lambda s: s.rank_many([("q", ["p"]), ("q", [3])]), "request 1: passage 0 must be a string", 1),
    (lambda s: s.rank_many([("q", ["p"]), "secret"]), "request 1 must be a .query, passages. tuple", 1),
    (lambda s: s.rank("q", ["p"], -1), "top_n must not be negative", None),
    (lambda s: s.rank("q", ["p"], "3"), "top_n must be an integer", None),
    (lambda s: s.rank("q", ["p"], threshold=float("nan")), "must be finite", None),
    (lambda s: s.rank("q", ["p"], threshold=float("inf")), "must be finite", None),
    (lambda s: s.rank_many([("q", ["p"])], threshold=-float("inf")), "must be finite", None),
    (lambda s: s.rank("", ["p"]), "^the query is blank$", None),
    (lambda s: s.rank(" \n\x0c", []), "^the query is blank$", None),
    (lambda s: s.rank("\u200b\xad", ["p"]), "^the query is blank$", None),
    (lambda s: s.rank_many([("q", []), ("\t", ["p"])]), "^request 1: the query is blank$", 1),
    (lambda s: s.rank_many([], -1), "top_n must not be negative", None),
]


@pytest.mark.parametrize(("call", "message", "index"), BAD_CALLS)
def test_input_errors_name_the_index_but_not_the_text(
    scorer: Scorer, call: Any, message: str | None, index: int | None
) -> None:
    if message is None:
        # An empty list of passages is valid, but the query must be valid too.
        message = "the query must be a string"
    with pytest.raises(InputError, match=message) as caught:
        call(scorer)
    assert caught.value.index == index
    assert "secret" not in str(caught.value)


@given(st.text(), st.lists(st.text(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_arbitrary_text_scores(scorer: Scorer, query: str, passages: list[str]) -> None:
    ranking = scorer.rank(f"{query}?", passages)
    assert sorted(p.index for p in ranking) == list(range(len(passages)))
    assert all(np.isfinite(p.score) for p in ranking)
    assert [p.blank for p in ranking] == sorted(p.blank for p in ranking)


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "\u202e", "</s></s> relevant", "x" * 10_000_000])
def test_odd_strings_score(scorer: Scorer, text: str) -> None:
    assert all(np.isfinite(scorer.score([(text, "passage"), ("query", text), (text, text)])))


def test_scores_that_are_not_finite_are_never_returned(checkpoint: Path, tmp_path: Path) -> None:
    """Finite weights can still overflow. Here the embedding of one word does."""

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    tokenizer = PairTokenizer(folder / "tokenizer.json", ScorerConfig())
    (pair,) = tokenizer.encode([""], ["panda"])
    word = int(pair.windows[0][3])
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["roberta.embeddings.word_embeddings.weight"][word] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Scorer(folder, device="cpu", dtype="float32") as broken:
        assert len(broken.score([("a", "b")])) == 1
        with pytest.raises(NonFiniteScoreError, match="pair 4500 ") as streaming:
            broken.score(("a", "panda" if number == 4500 else "b") for number in range(4600))
        assert streaming.value.index == 4500
        for call in (
            lambda: broken.score([("a", "b"), ("a", "panda"), ("a", "c")]),
            lambda: broken.rank("a", ["b", "panda", "panda"]),
            lambda: broken.rank_many([("a", ["b"]), ("a", ["panda"])]),
        ):
            with pytest.raises(NonFiniteScoreError) as caught:
                call()
            assert caught.value.index == 1
            assert pickle.loads(pickle.dumps(caught.value)).index == 1


def test_sixteen_threads_get_the_scores_of_one(scorer: Scorer, texts: list[str]) -> None:
    def call(number: int) -> list[float]:
        random = np.random.default_rng(number)
        chosen = [texts[i] for i in random.integers(0, len(texts), 1 + number % 9)]
        query = texts[number % len(texts)][: 10 + number]
        if number % 3 == 0:
            return [p.score for p in sorted(scorer.rank(query, chosen), key=lambda p: p.index)]
        if number % 3 == 1:
            return [p.score for p in sorted(scorer.rank_many([(query, chosen)])[0], key=lambda p: p.index)]
        return scorer.score([(query, text) for text in chosen])

    serial = [call(number) for number in range(96)]
    with ThreadPoolExecutor(16) as pool:
        concurrent = list(pool.map(call, range(96)))
    for ours, theirs in zip(concurrent, serial, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


async def test_async_methods_give_the_same_results(scorer: Scorer, texts: list[str]) -> None:
    pairs = [(QUERY, text) for text in texts[:4]]
    scores, ranking, rankings = await asyncio.gather(
        scorer.ascore(pairs), scorer.arank(QUERY, texts, 3), scorer.arank_many([(QUERY, texts)], 3)
    )
    assert scores == pytest.approx(scorer.score(pairs), abs=TOLERANCE)
    assert [p.index for p in ranking] == [p.index for p in scorer.rank(QUERY, texts, 3)]
    assert [[p.index for p in each] for each in rankings] == [[p.index for p in ranking]]
    assert [p.score for p in rankings[0]] == pytest.approx([p.score for p in ranking], abs=TOLERANCE)
    with pytest.raises(InputTypeError):
        await scorer.arank(QUERY, [None])  # type: ignore[list-item]


async def test_async_work_stays_off_the_loop_and_its_default_pool(
    scorer: Scorer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenization and scoring each wait for the loop. The loop could not answer if it ran them itself."""
    begun, answered = threading.Semaphore(0), threading.Semaphore(0)
    stream, (runner,) = PairTokenizer.stream, scorer._require_pipeline().runners
    forward = runner._forward

    def wait_for_the_loop() -> None:
        begun.release()
        assert answered.acquire(timeout=PATIENCE_S)

    def watched_stream(*args: Any) -> Iterator[list[EncodedPair]]:
        wait_for_the_loop()
        return stream(*args)

    def watched_forward(batch: PackedBatch) -> torch.Tensor:
        wait_for_the_loop()
        return forward(batch)

    async def answer() -> None:
        while True:
            if begun.acquire(blocking=False):
                answered.release()
            await asyncio.sleep(0.001)

    monkeypatch.setattr(PairTokenizer, "stream", watched_stream)
    monkeypatch.setattr(runner, "_forward", watched_forward)
    loop = asyncio.get_running_loop()
    blocked = threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    occupied = loop.run_in_executor(None, blocked.wait)
    answering = asyncio.create_task(answer())
    try:
        ranking = await asyncio.wait_for(scorer.arank(QUERY, texts), 3 * PATIENCE_S)
    finally:
        blocked.set()
        answering.cancel()
    assert len(ranking) == len(texts)
    await occupied


def test_concurrent_calls_of_shared_load_one_model(shared_config: ScorerConfig) -> None:
    barrier = threading.Barrier(16)

    def ask(_: int) -> Scorer:
        barrier.wait()
        return Scorer.shared(shared_config)

    with ThreadPoolExecutor(16) as pool:
        scorers = list(pool.map(ask, range(16)))
    assert len({id(scorer) for scorer in scorers}) == 1


async def test_shared_loads_off_the_loop(shared_config: ScorerConfig) -> None:
    scorers = await asyncio.gather(*(Scorer.ashared(shared_config) for _ in range(16)))
    assert len({id(scorer) for scorer in scorers}) == 1
    assert scorers[0] is Scorer.shared(shared_config)
    assert await Scorer.ashared(shared_config) is scorers[0]


def test_a_failed_load_reaches_everyone_and_can_be_tried_again(tmp_path: Path, checkpoint: Path) -> None:
    config = ScorerConfig(model=str(tmp_path / "later"), device="cpu", dtype="float32")
    barrier = threading.Barrier(4)

    def ask(_: int) -> type[BaseException] | None:
        barrier.wait()
        try:
            Scorer.shared(config)
        except CheckpointNotFoundError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {CheckpointNotFoundError}
    (tmp_path / "later").symlink_to(checkpoint)
    with Scorer.shared(config) as loaded:
        assert loaded.score([("a", "b")])


def test_other_settings_are_another_scorer(shared_config: ScorerConfig) -> None:
    shared = Scorer.shared(shared_config)
    own = Scorer.from_config(shared_config)
    assert own is not shared
    assert own.config == shared.config
    own.close()
    assert Scorer.shared(shared_config) is shared, "closing one's own leaves the shared one"


class OtherScorer(Scorer):
    """A subclass without changes."""


async def test_a_subclass_shares_scorers_of_its_own(shared_config: ScorerConfig) -> None:
    shared = Scorer.shared(shared_config)
    other = OtherScorer.shared(shared_config)
    assert type(other) is OtherScorer
    assert OtherScorer.shared(shared_config) is await OtherScorer.ashared(shared_config) is other
    assert pickle.loads(pickle.dumps(other)) is other
    other.close()
    assert Scorer.shared(shared_config) is shared, "closing the other one leaves this one"
    renewed = await OtherScorer.ashared(shared_config)
    assert (type(renewed), renewed is other) == (OtherScorer, False)
    renewed.close()


@pytest.mark.parametrize("timeout", [-1, float("inf"), "1"])
def test_close_with_a_bad_timeout_closes_nothing(timeout: Any, scorer: Scorer) -> None:
    with pytest.raises(InputError, match="timeout"):
        scorer.close(timeout)
    assert scorer.health().state == "ok"


def test_close(shared_config: ScorerConfig) -> None:
    first = Scorer.shared(shared_config)
    first.close()
    first.close()
    assert "closed" in repr(first)
    health = first.health()
    assert (health.state, health.ok, health.queued_requests, health.queued_tokens) == ("closed", False, 0, 0)
    assert (health.replicas, health.replicas_alive) == (1, 0)
    for call in (
        lambda: first.score([("a", "b")]),
        lambda: first.rank("a", []),
        lambda: asyncio.run(first.arank("a", ["b"])),
    ):
        with pytest.raises(ScorerClosedError):
            call()
    second = Scorer.shared(shared_config)
    assert second is not first
    assert second.score([("a", "b")])


async def test_close_finishes_accepted_requests(checkpoint: Path, texts: list[str]) -> None:
    scorer = Scorer(checkpoint, device="cpu", dtype="float32")
    expected = scorer.score([(QUERY, text) for text in texts])
    tasks = [asyncio.create_task(scorer.ascore([(QUERY, text) for text in texts])) for _ in range(6)]
    await asyncio.sleep(0)
    scorer.close()
    for scores in await asyncio.gather(*tasks):
        assert scores == pytest.approx(expected, abs=TOLERANCE)


async def test_close_waits_for_a_thread_that_has_not_begun_to_tokenize(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_started, may_run = threading.Event(), threading.Event()
    run = threading.Thread.run

    def run_later(thread: threading.Thread) -> None:
        if thread.name.startswith("bge-rerank-tokenize"):
            is_started.set()
            assert may_run.wait(PATIENCE_S)
        run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_later)
    scorer = Scorer(checkpoint, device="cpu", dtype="float32")
    accepted = asyncio.create_task(scorer.arank(QUERY, ["a", "b"]))
    assert await asyncio.to_thread(is_started.wait, PATIENCE_S)
    closing = asyncio.create_task(asyncio.to_thread(scorer.close))
    await asyncio.wait({closing}, timeout=0.1)  # it returns early only if it does not wait for the thread
    may_run.set()
    assert len(await accepted) == 2
    await closing


def test_a_second_close_ends_the_wait_of_the_first(checkpoint: Path) -> None:
    scorer = Scorer(checkpoint, device="cpu", dtype="float32", max_batch_tokens=64)
    pipeline, may_compute = scorer._pipeline, threading.Event()
    assert pipeline is not None
    (runner,) = pipeline.runners
    forward = runner._forward

    def compute(batch: PackedBatch) -> torch.Tensor:
        assert may_compute.wait(PATIENCE_S)
        return forward(batch)

    runner._forward = compute
    with ThreadPoolExecutor(2) as pool:
        try:
            ranking = pool.submit(scorer.rank, QUERY, [f"text {number}" for number in range(30)])
            wait_until(lambda: scorer.health().queued_tokens)
            first = pool.submit(scorer.close)
            wait_until(lambda: scorer.health().state != "ok")
            # A scorer that is being closed still has figures.
            assert scorer.health().queued_tokens > 0
            assert scorer.stats().queued_requests == 1
            scorer.close(timeout=0)
            with pytest.raises(ScorerClosedError):
                ranking.result(PATIENCE_S)
        finally:
            may_compute.set()
        first.result(PATIENCE_S)
    assert scorer.health().state == "closed"


def test_copies_are_the_same_and_pickles_hold_settings_only(shared_config: ScorerConfig) -> None:
    scorer = Scorer.shared(shared_config)
    assert copy.copy(scorer) is copy.deepcopy(scorer) is scorer
    pickled = pickle.dumps(scorer)
    assert len(pickled) < 2000
    assert pickle.loads(pickled) is scorer


async def test_a_pickle_that_cannot_be_loaded_raises_the_error_when_it_is_used(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    with Scorer(folder, device="cpu") as scorer:
        pickled = pickle.dumps(scorer)
    shutil.rmtree(folder)
    loaded = pickle.loads(pickled)
    assert loaded.config == scorer.config
    assert loaded.health().state == "closed"
    errors = []
    for call in (lambda: loaded.rank("q", ["a"]), lambda: loaded.score([("q", "a")]), loaded.warmup):
        with pytest.raises(CheckpointNotFoundError, match="does not exist") as caught:
            call()
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        await loaded.arank("q", ["a"])
    loaded.close()
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        pickle.loads(pickle.dumps(loaded)).rank("q", ["a"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), CheckpointError),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
            CheckpointError,
        ),
        (MemoryError(), CheckpointError),
        (DeviceError("the device is out of memory"), DeviceError),
        (RuntimeError("can't start new thread"), RuntimeError),
    ],
    ids=repr,
)
def test_a_failed_load_keeps_its_error_and_no_memory(
    error: Exception, expected: type[Exception], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weights:
        """Stands for the memory that loading takes."""

    loaded_weights: list[weakref.ref[Weights]] = []

    def load_runners(*_: object) -> None:
        weights = Weights()
        loaded_weights.append(weakref.ref(weights))
        raise type(error)(*error.args)

    with Scorer(checkpoint, device="cpu", num_threads=1) as scorer:
        pickled = pickle.dumps(scorer)
    monkeypatch.setattr("bge_rerank_integrations.engine.runner.load_runners", load_runners)
    with pytest.raises(expected) as caught:
        Scorer(checkpoint, device="cpu")
    assert type(caught.value) is expected
    assert str(error) in str(caught.value)
    gc.collect()
    gc.disable()
    try:
        failed = pickle.loads(pickled)
        assert loaded_weights.pop()() is None
    finally:
        gc.enable()
    with pytest.raises(expected) as caught:
        failed.rank("q", ["a"])
    assert type(caught.value) is expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_pool_that_gets_a_scorer_raises_an_error() -> None:
    code = (
        "import multiprocessing\n"
        "from bge_rerank_integrations import ForkedProcessError, Scorer\n"
        "def rank(scorer):\n"
        "    return scorer.rank('q', ['a'])\n"
        "if __name__ == '__main__':\n"
        "    scorer = Scorer('embedded', device='cpu')\n"
        "    with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "        try:\n"
        "            pool.map(rank, [scorer])\n"
        "        except ForkedProcessError as error:\n"
        "            print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}  # else some releases warn after a fork
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=environment
    )
    assert "neither CUDA nor CPU thread pools work after a fork" in run.stdout
    assert run.stderr == ""


def test_progress_shows_on_stderr_and_only_when_asked(scorer: Scorer, texts: list[str]) -> None:
    pairs = [(QUERY, text) for text in texts]
    shown = io.StringIO()
    with redirect_stderr(shown):
        quiet = scorer.score(pairs)
    assert shown.getvalue() == ""
    with redirect_stderr(shown):
        assert scorer.score(pairs, progress=True) == quiet
    assert f"{len(texts)}/{len(texts)}" in shown.getvalue()


@pytest.mark.parametrize(
    "call",
    [
        lambda scorer, **options: scorer.score([(QUERY, "a"), (QUERY, "b")], **options),
        lambda scorer, **options: scorer.score(iter([(QUERY, "a"), (QUERY, "b")]), **options),
        lambda scorer, **options: scorer.rank(QUERY, ["a", "b"], **options),
        lambda scorer, **options: scorer.rank_many([(QUERY, ["a", "b"])], **options),
    ],
)
def test_each_method_shows_progress_if_asked(scorer: Scorer, call: Any) -> None:
    shown = io.StringIO()
    with redirect_stderr(shown):
        call(scorer)
    assert shown.getvalue() == ""
    with redirect_stderr(shown):
        call(scorer, progress=True)
    assert re.search(r"\b2(/2|pair)", shown.getvalue())  # the number of pairs of an iterator is unknown


class Shouting(str):
    """A string whose methods do something else."""

    def __getitem__(self, key: Any) -> str:
        raise RuntimeError("not this one")

    def strip(self, chars: str | None = None, /) -> str:
        raise RuntimeError("not this one")

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"else"

    def __str__(self) -> str:
        return "else"


def test_the_methods_of_a_subclass_of_str_are_not_used(scorer: Scorer, texts: list[str]) -> None:
    loud = [Shouting(text) for text in texts]
    assert scorer.rank(Shouting(QUERY), loud) == scorer.rank(QUERY, texts)
    pairs = [(QUERY, text) for text in texts]
    assert scorer.score([(Shouting(QUERY), text) for text in loud]) == scorer.score(pairs)


class FullDisk(io.StringIO):
    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class LateFailure(FullDisk):
    """Fails when the bar advances, but not when it appears."""

    def write(self, text: str, /) -> int:
        return super().write(text) if "%" in text and "  0%" not in text else len(text)


def closed_file() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


class FullPipe(io.StringIO):
    """A file that cannot even be prepared for a bar."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Unusual(io.StringIO):
    """A replacement for stderr that raises what no file raises."""

    def write(self, text: str, /) -> int:
        raise RuntimeError("this application logs everything")


@pytest.mark.parametrize("stderr", [FullDisk(), LateFailure(), FullPipe(), Unusual(), closed_file(), None])
def test_a_bar_that_cannot_be_shown_does_not_fail_the_request(
    scorer: Scorer, texts: list[str], stderr: io.StringIO | None
) -> None:
    pairs = [(QUERY, text) for text in texts]
    with redirect_stderr(stderr):
        scores = scorer.score(pairs, progress=True)
        streamed = scorer.score(iter(pairs), progress=True)
    assert scores == scorer.score(pairs)
    assert streamed == pytest.approx(scores, abs=LOGIT_TOLERANCE[torch.float32])


def test_a_bar_shows_a_new_total_at_once() -> None:
    shown = io.StringIO()
    with redirect_stderr(shown), progress_bar() as (set_total, _):
        set_total(5)
        assert "0/5" in shown.getvalue()


class Interrupted(io.StringIO):
    """Ctrl-C is pressed while the bar is drawn."""

    def write(self, text: str, /) -> int:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stderr", [FullDisk(), LateFailure(), Interrupted()])
def test_a_bar_that_was_not_drawn_does_not_stop_other_threads(checkpoint: Path, stderr: io.StringIO) -> None:
    # Many batches: a bar is drawn again only after a tenth of a second.
    config = ScorerConfig(model=checkpoint, device="cpu", dtype="float32", max_batch_tokens=1)
    pairs = [(QUERY, f"a bear {number}") for number in range(400)]
    for shown_on in (stderr, io.StringIO()):
        scorer = Scorer.from_config(config)  # each has another worker thread
        try:
            with redirect_stderr(shown_on), suppress(KeyboardInterrupt):
                assert len(scorer.score(pairs, progress=True, timeout=PATIENCE_S)) == len(pairs)
        finally:
            scorer.close(timeout=1.0)
    assert "400/400" in shown_on.getvalue()


def test_arguments_are_not_changed(scorer: Scorer, texts: list[str]) -> None:
    pairs = [[QUERY, text] for text in texts[:5]]
    before = copy.deepcopy(pairs)
    scorer.score(pairs)  # type: ignore[arg-type]
    scorer.rank_many([(QUERY, texts)])
    assert pairs == before


def test_no_text_in_logs(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        scorer.rank("canary-query", ["canary-passage", "\ud800 canary"])
        with pytest.raises(InputTypeError):
            scorer.rank("canary-query", ["canary", 3])  # type: ignore[list-item]
    assert "canary" not in caplog.text


def test_warmup_and_repr(scorer: Scorer) -> None:
    scorer.warmup()
    assert repr(scorer) == f"Scorer(model={scorer.config.model!r}, cpu)"


def test_supports_rank_accepts_any_object_with_both_methods(scorer: Scorer) -> None:
    class Stranger:
        def rank(
            self, query: str, passages: Any, top_n: int | None = None, threshold: float | None = None
        ) -> list[RankedPassage]:
            return []

        async def arank(
            self, query: str, passages: Any, top_n: int | None = None, threshold: float | None = None
        ) -> list[RankedPassage]:
            return []

    typed: list[SupportsRank] = [scorer, Stranger()]
    assert all(isinstance(candidate, SupportsRank) for candidate in typed)
    assert not isinstance(object(), SupportsRank)


def test_the_processs_torch_settings_are_left_as_they_were(checkpoint: Path) -> None:
    def current() -> list[object]:
        return [
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.initial_seed(),
        ]

    before = current()
    with Scorer(checkpoint, device="cpu", dtype="float32") as other:
        other.score([("a", "b")])
    assert current() == before


def test_sets_and_tables_of_pairs_are_refused(scorer: Scorer) -> None:
    class DataFrame(list[tuple[str, str]]):
        """A table, which gives its columns when it is iterated."""

    for pairs in ({("a", "b")}, frozenset({("a", "b")}), DataFrame([("a", "b")])):
        with pytest.raises(InputTypeError, match=r"pairs must be a sequence"):
            scorer.score(pairs)
        with pytest.raises(InputTypeError, match=r"requests must be a sequence"):
            scorer.rank_many(pairs)
