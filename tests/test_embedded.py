"""The model that comes with the package ranks for real, the same in every precision."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import bge_rerank_integrations
from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, Scorer
from bge_rerank_integrations.config import EMBEDDED_MODEL, DType
from bge_rerank_integrations.engine.checkpoint.locate import EMBEDDED_FOLDER
from bge_rerank_integrations.engine.cpu.int8_support import int8_obstacle

# Question, a passage that answers it, one that shares more words with it and does not.
TRIPLES = [
    (
        "how long does it take to boil an egg?",
        "A hard-boiled egg needs ten to twelve minutes in simmering water, a soft-boiled one about six.",
        "Drawing an egg well takes a long time, since an egg has no edges and its shading is soft.",
    ),
    (
        "why is the sky blue?",
        "Air molecules scatter the short, blue wavelengths of sunlight more than the red ones, which colours the sky.",
        "She painted the walls of the nursery blue and hung a picture of a night sky above the bed.",
    ),
    (
        "who wrote Pride and Prejudice?",
        "Pride and Prejudice is an 1813 novel by the English author Jane Austen.",
        "The film of Pride and Prejudice was shot on location in Derbyshire and Wiltshire.",
    ),
    (
        "what causes rust on iron?",
        "Iron rusts when it reacts with oxygen and water, which forms a flaky layer of iron oxide.",
        "Iron is mined in Australia, Brazil and China, and most of it is made into steel.",
    ),
    (
        "how do I undo the last git commit?",
        "To take back the most recent commit but keep its changes, run git reset --soft HEAD~1.",
        "A git commit records a snapshot of the staged files together with a message and an author.",
    ),
    (
        "what is the capital of Australia?",
        "Canberra is the capital city of Australia, founded as a compromise between Sydney and Melbourne.",
        "Australia exports coal, iron ore, wool and wine, and its currency is the Australian dollar.",
    ),
    (
        "can dogs eat chocolate?",
        "Chocolate is poisonous to dogs: the theobromine in it can cause seizures and even death.",
        "Hot dogs and chocolate ice cream were the best-selling snacks at the stadium.",
    ),
    (
        "when did the Berlin Wall fall?",
        "The Berlin Wall came down on 9 November 1989, when the border crossings were opened.",
        "Berlin has many museums, and parts of its old city wall can be seen near the courthouse.",
    ),
    (
        "symptoms of vitamin D deficiency",
        "People who lack vitamin D may suffer from bone pain, muscle weakness and tiredness.",
        "Vitamin C is found in oranges, peppers and broccoli, and is easily destroyed by cooking.",
    ),
    (
        "how does a vaccine work?",
        "A vaccine shows the immune system a harmless part of a germ, so that antibodies are ready for the real one.",
        "The vaccine factory employs four hundred people who work in three shifts.",
    ),
    (
        "boiling point of water at high altitude",
        "On a mountain, where the air pressure is lower, water boils at less than 100 degrees Celsius.",
        "High altitude training camps are popular with long-distance runners and cyclists.",
    ),
    (
        "difference between a crocodile and an alligator",
        "An alligator has a broad, rounded snout, while a crocodile's is narrow and shows its lower teeth.",
        "The crocodile handbag was sold for twice as much as the leather one.",
    ),
    (
        "how to remove red wine from a carpet",
        "To get a red wine stain out of a carpet, blot it at once, then apply baking soda and cold water.",
        "Celebrities walked the red carpet before a dinner at which French wine was served.",
    ),
    (
        "why do cats purr?",
        "Cats purr when they are content, and also to calm themselves when they are hurt.",
        "Cats and dogs are kept as pets all over the world and need to be fed every day.",
    ),
    (
        "what does the mitochondrion do?",
        "Mitochondria produce most of a cell's ATP, the molecule that supplies it with energy.",
        "The mitochondrion has been drawn by students in biology exams for many decades.",
    ),
    (
        "fastest land animal",
        "The cheetah is the quickest animal on land and can run at more than 100 kilometres an hour.",
        "The animal shelter bought a piece of land outside the city to build more kennels.",
    ),
    (
        "how is cheese made?",
        "To make cheese, milk is curdled with rennet, the whey is drained and the curds are pressed and aged.",
        "Cheese goes well with bread, grapes and red wine, and is eaten after dinner in France.",
    ),
    (
        "what did Marie Curie discover?",
        "Marie Curie and her husband Pierre discovered two elements, polonium and radium.",
        "The Marie Curie high school has a swimming pool, a library and a large sports ground.",
    ),
    (
        "how can I sleep better at night?",
        "For better sleep, go to bed at regular hours, avoid coffee after lunch and keep the bedroom dark.",
        "The night train from Vienna to Rome has seats, couchettes and sleeping cars.",
    ),
    (
        "what is inflation in economics?",
        "In economics, inflation is a general rise in prices, so that money buys less than before.",
        "The inflation of a hot-air balloon takes half an hour and a powerful fan.",
    ),
]
MAX_BYTES = 35_000_000


@pytest.fixture(scope="module")
def scorer() -> Any:
    with Scorer(EMBEDDED_MODEL, device="cpu", dtype="float32") as scorer:
        yield scorer


@pytest.mark.parametrize("triple", TRIPLES, ids=[triple[0] for triple in TRIPLES])
def test_the_passage_that_answers_comes_first(scorer: Scorer, triple: tuple[str, str, str]) -> None:
    query, relevant, distractor = triple
    assert scorer.rank(query, [distractor, relevant])[0].index == 1


def test_an_answer_is_found_among_all_passages(scorer: Scorer) -> None:
    passages = [passage for _, relevant, distractor in TRIPLES for passage in (distractor, relevant)]
    rankings = scorer.rank_many([(query, passages) for query, _, _ in TRIPLES], top_n=1)
    found = [ranking[0].index == 2 * i + 1 for i, ranking in enumerate(rankings)]
    assert sum(found) >= 19, f"missed: {[i for i, right in enumerate(found) if not right]}"


def test_order_is_kept_in_other_precisions(scorer: Scorer) -> None:
    dtypes: list[tuple[str, DType]] = [("cpu", "bfloat16")]
    if int8_obstacle() is None:
        dtypes.append(("cpu", "int8"))
    if torch.cuda.is_available():
        dtypes += [("cuda", "float16"), ("cuda", "bfloat16")]
    passages = [passage for _, relevant, distractor in TRIPLES for passage in (relevant, distractor)]
    for device, dtype in dtypes:
        with Scorer(EMBEDDED_MODEL, device=device, dtype=dtype) as other:
            for query, relevant, distractor in TRIPLES:
                assert other.rank(query, [distractor, relevant])[0].index == 1, (dtype, query)
            for query, _, _ in TRIPLES:
                exact = scorer.score([(query, passage) for passage in passages])
                rounded = other.score([(query, passage) for passage in passages])
                # Neighbours may trade places where the scores are as good as equal, and nowhere else.
                order = sorted(range(len(passages)), key=lambda i: -rounded[i])
                rises = [exact[after] - exact[before] for before, after in pairwise(order)]
                assert max(rises) < 0.25, (dtype, query)


def test_both_adapters_take_it() -> None:
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode

    query, relevant, distractor = TRIPLES[0]
    documents = [Document(page_content=distractor), Document(page_content=relevant)]
    [best] = BGEReranker(model="embedded", top_n=1).compress_documents(documents, query)
    assert best.page_content == relevant
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in (distractor, relevant)]
    [node] = BGERerankPostprocessor(model="embedded", top_n=1).postprocess_nodes(nodes, query_str=query)
    assert node.get_content() == relevant


def test_a_folder_of_that_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    query, relevant, distractor = TRIPLES[0]
    with Scorer("embedded", device="cpu") as scorer:
        assert scorer.rank(query, [distractor, relevant])[0].index == 1


def test_it_is_complete_small_and_no_bge_model() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= MAX_BYTES
    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["XLMRobertaForSequenceClassification"]
    card = (EMBEDDED_FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("no BGE model", "ms-marco-MiniLM-L-12-v2", "Apache-2.0", "English", "Not good for"):
        assert word in card
    assert "Apache License" in (EMBEDDED_FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "MiniLM" in (EMBEDDED_FOLDER / "NOTICE").read_text(encoding="utf-8")
    root = Path(bge_rerank_integrations.__file__).parents[1]
    pinned = re.search("`([0-9a-f]{64})`", card)
    assert pinned is not None
    with Scorer("embedded", device="cpu", sha256=pinned.group(1)):  # the card is of these weights
        pass
    assert (root / "pyproject.toml").exists()
