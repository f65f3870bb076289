"""Runs the code of docs/recipes.md with the embedded model, or compiles it if a package is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.language_models import FakeListLLM
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
QUESTION = "what does a giant panda eat?"
PASSAGES = [
    "The stock market fell sharply on Monday.",
    "Giant pandas eat bamboo, mostly its leaves and shoots.",
    "A giant panda is a bear native to China.",
    "Tea is made of leaves and hot water.",
]


class FixedRetriever(BaseRetriever):
    """Returns the same documents for every question and records the questions."""

    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        self.asked.append(query)
        return [Document(page_content=text, id=str(at)) for at, text in enumerate(PASSAGES)]


def blocks(heading: str, text: str = TEXT) -> list[str]:
    """Return the Python blocks below a heading, with a local model instead of the model on the hub."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return [block.replace("BAAI/bge-reranker-base", "embedded") for block in found]


def run(code: str, **names: Any) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "recipe", **names}
    exec(compile(code, "docs/recipes.md", "exec", dont_inherit=True), namespace)
    return namespace


def test_every_block_compiles_and_every_recipe_is_tested() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert headings == [
        "MultiQueryRetriever",
        "LangGraph",
        "EmbeddingsFilter before a reranker",
        "Streamlit",
        "gunicorn",
        "Celery",
    ]
    for heading in headings:
        for block in blocks(heading):
            compile(block, heading, "exec", dont_inherit=True)


def test_multi_query() -> None:
    base_retriever = FixedRetriever()
    llm = FakeListLLM(responses=["which food do pandas like?\nwhat is bamboo eaten by?"])
    (code,) = blocks("MultiQueryRetriever")
    recipe = run(code, base_retriever=base_retriever, llm=llm)
    documents = recipe["retriever"].invoke(QUESTION)
    assert len(base_retriever.asked) == 3
    assert documents[0].page_content == PASSAGES[1]
    assert sorted(document.page_content for document in documents) == sorted(PASSAGES)
    scores = [document.metadata["relevance_score"] for document in documents]
    assert scores == sorted(scores, reverse=True)


def test_a_reranker_inside_multi_query_behaves_as_the_recipe_says() -> None:
    from langchain_classic.retrievers import ContextualCompressionRetriever, MultiQueryRetriever

    from bge_rerank_integrations import BGEReranker

    inside = ContextualCompressionRetriever(
        base_compressor=BGEReranker(model="embedded", top_n=2), base_retriever=FixedRetriever()
    )
    llm = FakeListLLM(responses=["which food do pandas like?\nwhat is bamboo eaten by?"])
    documents = MultiQueryRetriever.from_llm(inside, llm, include_original=True).invoke(QUESTION)
    assert len(documents) > 2
    assert len({document.page_content for document in documents}) < len(documents)


class StatefulDocument(Document):
    """A small replacement for the documents that `EmbeddingsFilter` returns."""

    state: dict[str, Any] = Field(default_factory=dict)


def test_plain_documents_after_a_filter() -> None:
    from bge_rerank_integrations import BGEReranker

    found = [StatefulDocument(page_content=text, state={"embedded_doc": [0.5]}) for text in PASSAGES]
    reranked: Sequence[Document] = BGEReranker(model="embedded", top_n=2).compress_documents(found, QUESTION)
    assert {type(document) for document in reranked} == {StatefulDocument}
    (code,) = blocks("EmbeddingsFilter before a reranker")
    documents: list[Document] = run(code, documents=reranked)["documents"]
    assert [type(document) for document in documents] == [Document, Document]
    assert documents[0].page_content == PASSAGES[1]
    assert type(documents[0].metadata["relevance_score"]) is float


def test_embeddings_filter_and_a_checkpoint() -> None:
    pytest.importorskip("langgraph")
    pytest.importorskip("langchain_community")
    from langchain_classic.retrievers.document_compressors import (
        DocumentCompressorPipeline,
        EmbeddingsFilter,
    )
    from langchain_core.embeddings import DeterministicFakeEmbedding

    from bge_rerank_integrations import BGEReranker

    serde: Any = importlib.import_module("langgraph.checkpoint.serde.jsonplus").JsonPlusSerializer()
    embeddings_filter = EmbeddingsFilter(embeddings=DeterministicFakeEmbedding(size=4), k=3)
    stages: list[Any] = [embeddings_filter, BGEReranker(model="embedded")]
    pipeline: BaseDocumentCompressor = DocumentCompressorPipeline(transformers=stages)
    filtered = pipeline.compress_documents([Document(page_content=text) for text in PASSAGES], QUESTION)
    with pytest.raises(TypeError, match="Type is not msgpack serializable: _DocumentWithState"):
        serde.dumps_typed(list(filtered))
    (code,) = blocks("EmbeddingsFilter before a reranker")
    documents = run(code, documents=filtered)["documents"]
    assert serde.loads_typed(serde.dumps_typed(documents)) == documents


async def test_langgraph() -> None:
    pytest.importorskip("langgraph")
    (code,) = blocks("LangGraph")
    recipe = run(code, base_retriever=FixedRetriever())
    config = {"configurable": {"thread_id": "1"}}
    await recipe["app"].ainvoke({"question": QUESTION}, config)
    documents = recipe["app"].get_state(config).values["documents"]
    assert documents[0].page_content == PASSAGES[1]
    assert len(documents) == 4
    assert {type(document) for document in documents} == {Document}


def test_streamlit(tmp_path: Path) -> None:
    pytest.importorskip("streamlit")
    testing: Any = importlib.import_module("streamlit.testing.v1")
    (code,) = blocks("Streamlit")
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    app = testing.AppTest.from_file(str(tmp_path / "page.py"), default_timeout=60)
    for question in (QUESTION, "is it an animal?"):
        app.run()
        assert not app.exception
        assert len(app.markdown) == 2
        app.text_input[0].set_value(question)


# Gunicorn and Celery import the module, fork, call the hook in the child, and work there. The parent loads no
# model.
FORKING = """
import os, sys
import app
child = os.fork()
if child == 0:
    hook = sys.argv[1]
    if hook == "post_worker_init":
        exec(compile(open("gunicorn.conf.py").read(), "gunicorn.conf.py", "exec"))
        post_worker_init(None)
    results = app.reranker.rerank(["Bamboo, mostly.", "A bear."], "what does a giant panda eat?")
    os._exit(0 if len(results) == 2 else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("hook", ["post_worker_init", "none"])
def test_gunicorns_hook_in_a_forked_child(hook: str, tmp_path: Path) -> None:
    app, conf = blocks("gunicorn")
    (tmp_path / "app.py").write_text(app, encoding="utf-8")
    (tmp_path / "gunicorn.conf.py").write_text(conf, encoding="utf-8")
    (tmp_path / "forking.py").write_text(FORKING, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "forking.py", hook]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses Celery if it is installed, else a replacement for the parts that the recipe uses."""
    (code,) = blocks("Celery")
    if importlib.util.find_spec("celery") is None:
        celery, signals = ModuleType("celery"), ModuleType("celery.signals")
        celery.Celery = FakeCelery  # type: ignore[attr-defined]
        signals.worker_process_init = FakeSignal()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "celery", celery)
        monkeypatch.setitem(sys.modules, "celery.signals", signals)
    recipe = run(code, broker_url="memory://", result_backend="cache+memory://")
    recipe["load_model"](sender=None)
    results = recipe["rerank"](QUESTION, PASSAGES)
    assert results[0]["index"] == 1
    assert recipe["app"].conf.worker_proc_alive_timeout == 120.0


class FakeCelery:
    def __init__(self, name: str, broker: str, backend: str) -> None:
        self.conf = ModuleType("conf")

    def task(self, function: Any) -> Any:
        return function


class FakeSignal:
    def connect(self, function: Any) -> Any:
        return function


def test_equivalent_thresholds_on_both_scales_keep_the_same_documents() -> None:
    (code,) = blocks("Thresholds", MIGRATING)
    recipe = run(code)
    assert recipe["to_raw"](recipe["to_normalized"](-1.5)) == pytest.approx(-1.5)
    documents = [Document(page_content=text) for text in PASSAGES]
    kept = [
        [document.page_content for document in recipe[name].compress_documents(documents, QUESTION)]
        for name in ("on_logits", "same_on_0_to_1")
    ]
    assert kept[0] == kept[1]
    assert 0 < len(kept[0]) < len(PASSAGES)
