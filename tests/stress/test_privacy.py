"""Texts and secrets do not appear in logs, errors or dumps."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import secrets
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from bge_rerank_integrations import BGEReranker, BGERerankPostprocessor, Scorer
from bge_rerank_integrations.errors import RerankError
from tests.stress.common import Bench, check, overflowing_checkpoint


@pytest.mark.stress
def test_no_text_or_secret_is_shown(bench: Bench) -> None:
    query, document, token = (f"{kind}canary{secrets.token_hex(8)}" for kind in ("q", "d", "t"))
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = token
    try:
        with _all_logs() as logs:
            shown = list(_everything_shown(bench, query, document))
    finally:
        os.environ.pop("HF_TOKEN")
        if before is not None:
            os.environ["HF_TOKEN"] = before
    shown.append(("logs", "\n".join(logs)))
    found = Counter(where for where, text in shown for canary in (query, document, token) if canary in text)
    kinds = Counter(where for where, _ in shown)
    looked_at = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if kind != "logs")
    check(
        not found and len(logs) > 0 and kinds["exceptions"] > 10,
        f"found in {looked_at} and {len(logs)} log records: {dict(found) if found else 'none'}",
    )


def _everything_shown(bench: Bench, query: str, document: str) -> Iterator[tuple[str, str]]:
    """Score the canaries in every way. Yield each visible text with its kind."""
    folder, _ = overflowing_checkpoint(bench, "panda")
    with ExitStack() as stack:
        scorer = stack.enter_context(Scorer(bench.checkpoint, device="cpu"))
        broken = stack.enter_context(Scorer(folder, device="cpu"))
        refusing = stack.enter_context(Scorer(bench.checkpoint, device="cpu", blank_passages="refuse"))
        narrow = stack.enter_context(Scorer(bench.checkpoint, device="cpu", max_queued_tokens=5))
        langchain = BGEReranker(model=str(bench.checkpoint), device="cpu")
        llama_index = BGERerankPostprocessor(model=str(bench.checkpoint), device="cpu")
        shared = scorer.shared(langchain.scorer_config())
        stack.enter_context(shared)
        documents = [Document(page_content=document), Document(page_content="other")]
        nodes = [NodeWithScore(node=TextNode(text=each.page_content)) for each in documents]
        many = [f"{document} {n}" for n in range(500)]
        scorer.score([(query, document)])
        asyncio.run(scorer.ascore([(query, document * 1000)]))
        langchain.compress_documents(documents, query)
        llama_index.postprocess_nodes(nodes, query_str=query)
        yield from _errors_shown(
            [
                lambda: scorer.score([(query, document), (query, 3)]),  # type: ignore[list-item]
                lambda: scorer.score([document]),  # type: ignore[list-item]
                lambda: scorer.rank(query, document),
                lambda: scorer.rank(query, [document, None]),  # type: ignore[list-item]
                lambda: scorer.rank(query, [document], top_n=document),  # type: ignore[arg-type]
                lambda: scorer.rank(query, many, timeout=0.0),
                lambda: asyncio.run(scorer.arank(query, many, timeout=0.0)),
                lambda: scorer.rank_many([(query, [document]), (query, [3])]),  # type: ignore[list-item]
                lambda: broken.rank(query, [document, "panda"]),
                lambda: narrow.rank(query, [document]),
                lambda: langchain.compress_documents([*documents, document], query),  # type: ignore[list-item]
                lambda: langchain.rerank([document, 3], query),  # type: ignore[list-item]
                lambda: langchain.model_copy(
                    update={"document_template": "{title}{page_content}"}
                ).compress_documents(documents, query),
                lambda: llama_index.postprocess_nodes([*nodes, document], query_str=query),  # type: ignore[list-item]
                lambda: refusing.rank(query, [document, ""]),
                lambda: BGEReranker(top_n=document),  # type: ignore[arg-type]
                lambda: BGERerankPostprocessor(top_n=document),  # type: ignore[arg-type]
                lambda: Scorer("nobody/nothing", local_files_only=True, cache_folder=str(bench.folder)),
            ]
        )
        for shown in (scorer, scorer.config, scorer.stats(), scorer.health(), langchain, llama_index, shared):
            yield "reprs", repr(shown) + str(shown)
        dumps: list[object] = [langchain.model_dump(), langchain.model_dump_json(), langchain.scorer_config()]
        dumps += [llama_index.to_dict(), llama_index.to_json(), llama_index.model_dump()]
        dumps += [scorer.config.to_dict(), scorer.stats().to_dict()]
        for dump in dumps:
            yield "dumps", str(dump)
        for kept in (scorer, scorer.config, scorer.stats(), langchain, llama_index):
            yield "pickles", pickle.dumps(kept, protocol=2).decode("latin-1")


def _errors_shown(calls: Iterable[Callable[[], object]]) -> Iterator[tuple[str, str]]:
    for number, call in enumerate(calls):
        error = _error_of(call, number)
        yield "exceptions", repr(error) + "".join(traceback.format_exception(error))
        if isinstance(error, RerankError):
            yield "pickles", pickle.dumps(error, protocol=2).decode("latin-1")


def _error_of(call: Callable[[], object], number: int) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError(f"call {number}, which must fail, succeeded")


@contextmanager
def _all_logs() -> Iterator[list[str]]:
    """Collect every record of every logger, at every level."""
    records: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(self.format(record) + repr(vars(record)))

    named = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    before = [(each, each.level, each.disabled, each.handlers) for each in (logging.root, *named)]
    for logger, *_ in before:
        logger.setLevel(logging.DEBUG)
        logger.disabled = False
        logger.handlers = [Collector()] if logger is logging.root or not logger.propagate else []
    try:
        yield records
    finally:
        for logger, level, disabled, handlers in before:
            logger.setLevel(level)
            logger.disabled, logger.handlers = disabled, handlers
