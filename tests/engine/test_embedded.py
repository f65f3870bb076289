"""The model that comes with the package ranks sensibly, and alike in every precision."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
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
from tests.support.triples import TRIPLES

MAX_BYTES = 35_000_000


@pytest.fixture(scope="module")
def scorer() -> Any:
    with Scorer(EMBEDDED_MODEL, device="cpu", dtype="float32") as scorer:
        yield scorer


@pytest.mark.parametrize("triple", TRIPLES, ids=[triple[0] for triple in TRIPLES])
def test_the_embedded_model_ranks_the_answer_above_a_distractor(
    scorer: Scorer, triple: tuple[str, str, str]
) -> None:
    query, relevant, distractor = triple
    assert scorer.rank(query, [distractor, relevant])[0].index == 1


def test_the_embedded_model_finds_the_answer_among_all_passages(scorer: Scorer) -> None:
    passages = [passage for _, relevant, distractor in TRIPLES for passage in (distractor, relevant)]
    rankings = scorer.rank_many([(query, passages) for query, _, _ in TRIPLES], top_n=1)
    found = [ranking[0].index == 2 * i + 1 for i, ranking in enumerate(rankings)]
    assert sum(found) >= 19, f"missed: {[i for i, right in enumerate(found) if not right]}"


def test_other_precisions_keep_the_ranking_of_the_embedded_model(scorer: Scorer) -> None:
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
                # Neighbours may swap places only if their exact scores are almost equal.
                order = sorted(range(len(passages)), key=lambda i: -rounded[i])
                rises = [exact[after] - exact[before] for before, after in pairwise(order)]
                assert max(rises) < 0.25, (dtype, query)


def test_both_adapters_accept_the_embedded_model() -> None:
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode

    query, relevant, distractor = TRIPLES[0]
    documents = [Document(page_content=distractor), Document(page_content=relevant)]
    [best] = BGEReranker(model="embedded", top_n=1).compress_documents(documents, query)
    assert best.page_content == relevant
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in (distractor, relevant)]
    [node] = BGERerankPostprocessor(model="embedded", top_n=1).postprocess_nodes(nodes, query_str=query)
    assert node.get_content() == relevant


def test_a_folder_named_embedded_does_not_replace_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    query, relevant, distractor = TRIPLES[0]
    with Scorer("embedded", device="cpu", dtype="float32") as scorer:
        assert scorer.rank(query, [distractor, relevant])[0].index == 1


def test_the_embedded_model_is_complete_and_small_and_its_card_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= MAX_BYTES
    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["XLMRobertaForSequenceClassification"]
    card = (EMBEDDED_FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("not a BGE model", "ms-marco-MiniLM-L-12-v2", "Apache-2.0", "English", "## Limitations"):
        assert word in card
    assert "Apache License" in (EMBEDDED_FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "MiniLM" in (EMBEDDED_FOLDER / "NOTICE").read_text(encoding="utf-8")
    root = Path(bge_rerank_integrations.__file__).parents[1]
    pinned = re.search("`([0-9a-f]{64})`", card)
    assert pinned is not None
    with Scorer(
        "embedded", device="cpu", dtype="float32", sha256=pinned.group(1)
    ):  # the card describes these weights
        pass
    assert (root / "pyproject.toml").exists()


def test_an_archive_of_the_package_gives_a_typed_error(tmp_path: Path) -> None:
    archive, package = tmp_path / "package.zip", EMBEDDED_FOLDER.parent
    with zipfile.ZipFile(archive, "w") as file:
        for path in package.rglob("*"):
            if path.is_file() and path.suffix in {".py", ".json"}:
                file.write(path, path.relative_to(package.parent))
    code = """
        import sys
        import bge_rerank_integrations
        from bge_rerank_integrations import CheckpointNotFoundError, Scorer
        assert bge_rerank_integrations.__file__.startswith(sys.argv[1])
        try:
            Scorer("embedded", device="cpu")
        except CheckpointNotFoundError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(archive)],
        env={**os.environ, "PYTHONPATH": str(archive)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "it cannot read the model from a zip archive" in run.stdout
