"""The training steps of the embedded model, with small random models and texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.evaluation.datasets import BeirDataset, Run, read_run
from training import distill
from training.dataset import Pairs, judged_groups, load
from training.original import CLS, EOS, SEP, VOCAB_SIZE, Ids, Original
from training.pack import pack, quantize_rows
from training.pairs import make_groups
from training.sources import verify_scifact
from training.student import Vocabulary, create, keep_layers, save
from training.table import score_run
from training.texts import Document

TOLERANCE = 1e-4  # for logits with a standard deviation of about 1


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=384,
            num_hidden_layers=3,
            num_attention_heads=12,
            intermediate_size=1536,
            layer_norm_eps=1e-12,
            id2label={0: "relevance"},
            initializer_range=0.1,
        )
    )
    model.train(False)
    return model


def renamed(bert: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in bert.state_dict().items() if "position_ids" not in name}


def random_pairs(lengths: Iterable[tuple[int, int]]) -> list[tuple[Ids, Ids]]:
    rng = np.random.default_rng(1)
    return [(rng.integers(104, 200, n, np.int32), rng.integers(104, 200, m, np.int32)) for n, m in lengths]


def test_the_original_computes_what_bert_does(bert: Any) -> None:
    pairs = random_pairs([(3, 20), (9, 4), (5, 504), (1, 1)])
    logits, hidden = Original(renamed(bert), num_layers=3)(pairs)
    for row, (query, passage) in enumerate(pairs):
        first, second = [CLS, *query, SEP], [*passage, SEP]
        types = [0] * len(first) + [1] * len(second)
        with torch.no_grad():
            output = bert(
                input_ids=torch.tensor([first + second]),
                token_type_ids=torch.tensor([types]),
                output_hidden_states=True,
            )
        assert logits[row].item() == pytest.approx(output.logits.item(), abs=TOLERANCE)
        for ours, theirs in zip(hidden, output.hidden_states, strict=True):
            assert torch.allclose(ours[row, : len(types)], theirs[0], atol=TOLERANCE)
    assert logits.std() > 100 * TOLERANCE


def small_tokenizer() -> dict[str, Any]:
    pieces = ["[PAD]", "[unused0]", *"abcdef", *(f"##{c}" for c in "abcdef"), "bed", "cab", "##ed", "fade"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    vocabulary |= {"[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


def spelled_tokenizer() -> dict[str, Any]:
    parsed = small_tokenizer()
    parsed["model"]["vocab"] |= {f"word{number}": number for number in range(104, 200)}
    return parsed


def test_a_vocabulary_gives_each_piece_the_id_of_its_own_embedding(tmp_path: Path) -> None:
    parsed = small_tokenizer()
    vocabulary = Vocabulary(parsed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary.to_tokenizer()))
    before = Tokenizer.from_str(json.dumps(parsed))
    after = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("bed", "a faded cab", "fab", "zebra bed"):
        old = np.asarray(before.encode(text, add_special_tokens=False).ids, np.int32)
        new = after.encode(text, add_special_tokens=False).ids
        assert vocabulary.remap(old).tolist() == new
    assert [after.token_to_id(piece) for piece in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert after.token_to_id("[unused0]") is None
    assert after.encode("bed", "cab").ids == [0, 17, EOS, EOS, 18, EOS]


def test_a_packed_student_scores_nearly_as_the_plain_one(bert: Any, tmp_path: Path) -> None:
    parsed = small_tokenizer()
    vocabulary = Vocabulary(parsed)
    model = create(renamed(bert), vocabulary, range(3))
    save(model, vocabulary, tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed")
    pairs = [("a bed", "cab"), ("fade", "a cab faced a bed"), ("bed", "dead")]
    with (
        Scorer(tmp_path / "plain", device="cpu", dtype="float32") as plain,
        Scorer(tmp_path / "packed", device="cpu", dtype="float32") as packed,
    ):
        exact = plain.score(pairs)
        assert packed.score(pairs) == pytest.approx(exact, abs=0.1)
    shorter = keep_layers(model, (0, 2))
    assert shorter.config.num_hidden_layers == 2
    kept = shorter.state_dict()["roberta.encoder.layer.1.output.dense.weight"]
    assert torch.equal(kept, model.state_dict()["roberta.encoder.layer.2.output.dense.weight"])


def test_rows_are_quantized_each_by_its_own_range() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [100.0, 0.0, -50.0], [0.0, 0.0, 0.0]])
    stored, scale = quantize_rows(weight)
    assert stored.dtype is torch.int8
    assert stored.abs().amax(1).tolist() == [127, 127, 0]
    assert (
        torch.allclose(stored * scale, weight, atol=0, rtol=0)
        or ((stored * scale - weight).abs() <= scale / 2 + 1e-9).all()
    )


def test_a_query_is_paired_with_its_own_passage_and_similar_ones(texts: list[str]) -> None:
    english = [text for text in texts if text.isascii()]
    documents = [Document(text[:30], text) for text in english]
    groups = make_groups(documents, 40, seed=3)
    assert groups == make_groups(documents, 40, seed=3)
    assert groups != make_groups(documents, 40, seed=4)
    assert all(len(group.passages) == 7 and group.query for group in groups)
    assert len(Counter(group.query for group in groups)) > 30
    overlap = [
        [len(set(group.query.lower().split()) & set(passage.lower().split())) for passage in group.passages]
        for group in groups
    ]
    assert np.mean([row[0] for row in overlap]) > np.mean([row[-1] for row in overlap])


def test_a_judged_query_is_paired_with_its_relevant_passages_and_other_results() -> None:
    corpus = {f"p{n}": f"word{n % 3} word{n} text" for n in range(40)}
    judged = BeirDataset(
        corpus=corpus, queries={"q": "word7 text", "other": "text"}, qrels={"q": {"p7": 1, "p9": 0, "p11": 1}}
    )
    [group] = judged_groups(judged, seed=3)
    assert group.query == "word7 text"
    assert group.passages[:2] == [corpus["p7"], corpus["p11"]]
    assert len(group.passages) == 2 + 4 + 2 + 1
    assert len(set(group.passages[2:-1]) - {corpus["p7"], corpus["p11"]}) == 6
    with pytest.raises(ValueError, match="not SciFact"):
        verify_scifact(judged)


def test_pairs_survive_writing_and_reading(tmp_path: Path) -> None:
    ids = [np.asarray(row, np.int32) for row in ([1, 2], [3], [4, 5, 6])]
    Pairs(ids, ids[::-1]).save(tmp_path / "pairs.npz")
    read = load(tmp_path / "pairs.npz")
    for ours, theirs in zip([*read.queries, *read.passages], [*ids, *ids[::-1]], strict=True):
        assert ours.tolist() == theirs.tolist()


def test_a_student_learns_to_do_what_the_original_does(bert: Any) -> None:
    vocabulary = Vocabulary(spelled_tokenizer())
    original = Original(renamed(bert), num_layers=3)
    model = create(renamed(bert), vocabulary, range(3))
    pairs = random_pairs([(3, 20), (9, 4), (5, 60), (1, 1)] * 3)
    with torch.no_grad():
        before = distill.imitation_losses(model, original, range(3), vocabulary, pairs)
    schedule = distill.Schedule(num_pairs=120, learning_rate=1e-4, max_batch_tokens=200)
    learned = Pairs([query for query, _ in pairs], [passage for _, passage in pairs])
    distill.distill(model, original, range(3), vocabulary, learned, schedule)
    with torch.no_grad():
        after = distill.imitation_losses(model, original, range(3), vocabulary, pairs)
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.7 * before[1]


def test_compared_hidden_states_belong_to_the_same_tokens(bert: Any) -> None:
    """Without attention, positions and token types, a hidden state depends only on its token."""
    alone = renamed(bert)
    for name in alone:
        if "attention.output.dense" in name or "position_embeddings" in name or "token_type" in name:
            alone[name] = torch.zeros_like(alone[name])
    vocabulary = Vocabulary(spelled_tokenizer())
    original, student = Original(alone, num_layers=3), create(alone, vocabulary, range(3))
    with torch.no_grad():
        pairs = random_pairs([(3, 20), (9, 600), (1, 1)])
        logits, hidden = distill.imitation_losses(student, original, range(3), vocabulary, pairs)
        assert logits.item() == pytest.approx(0, abs=1e-8)
        assert hidden.item() == pytest.approx(0, abs=1e-8)
        _, hidden = distill.imitation_losses(student, original, (0, 2, 1), vocabulary, pairs)
        assert hidden.item() > 0.01


RUN = {f"q{i}": {f"p{n}": float(-n) for n in range(i, i + 3)} for i in range(4)}
TEXTS = BeirDataset(
    corpus={f"p{n}": "word " * n for n in range(6)},
    queries={f"q{i}": f"query {i}" for i in range(4)},
    qrels={},
)


def score_by_length(asked: list[str], num_queries: int = 99) -> Any:
    """Return a score function that prefers longer passages and is interrupted after some queries."""

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        if len(asked) == num_queries:
            raise KeyboardInterrupt
        asked.append(pairs[0][0])
        return [len(passage) / 3 for _, passage in pairs]

    return score


def test_a_saved_run_is_not_scored_again(tmp_path: Path) -> None:
    kept = tmp_path / "original.trec"
    asked: list[str] = []
    whole = score_run(score_by_length(asked), TEXTS, RUN, kept)
    assert whole["q1"] == {"p1": 5 / 3, "p2": 10 / 3, "p3": 15 / 3}
    assert read_run(kept) == whole
    assert score_run(score_by_length(asked), TEXTS, RUN, kept) == whole
    assert asked == [f"query {i}" for i in range(4)]


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    kept = tmp_path / "original.trec"
    asked: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        score_run(score_by_length(asked, 2), TEXTS, RUN, kept)
    assert list(read_run(kept)) == ["q0", "q1"]
    score_run(score_by_length(asked), TEXTS, RUN, kept)
    assert asked == [f"query {i}" for i in range(4)]
    assert list(read_run(kept)) == list(RUN)


def test_an_incomplete_last_query_is_dropped_wherever_the_file_ends(tmp_path: Path) -> None:
    kept = tmp_path / "original.trec"
    whole = score_run(score_by_length([]), TEXTS, RUN, kept)
    text = kept.read_bytes()
    for end in range(len(text)):
        kept.write_bytes(text[:end])
        asked: list[str] = []
        assert score_run(score_by_length(asked), TEXTS, RUN, kept) == whole
        assert kept.read_bytes() == text
        assert len(asked) == 4 - text[:end].count(b"\n") // 3  # complete queries are not scored again


def test_saved_scores_are_kept_and_scores_of_other_passages_are_computed_again(tmp_path: Path) -> None:
    kept = tmp_path / "original.trec"
    whole = score_run(score_by_length([]), TEXTS, RUN, kept)
    asked: list[str] = []
    fewer: Run = {"q3": RUN["q3"], "q1": {"p1": 2.0, "p5": 1.0}}
    found = score_run(score_by_length(asked), TEXTS, fewer, kept)
    assert asked == ["query 1"]
    assert found == {"q3": whole["q3"], "q1": {"p1": 5 / 3, "p5": 25 / 3}}
    assert read_run(kept) == {**whole, "q1": found["q1"]}
