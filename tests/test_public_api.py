"""The names, calls and options that users rely on. A change here is a change of the public interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode

import bge_rerank_integrations
from bge_rerank_integrations import (
    BGEReranker,
    BGERerankPostprocessor,
    RerankError,
    Scorer,
    ScorerConfig,
    errors,
)

CORE_OPTIONS = {
    "model": "BAAI/bge-reranker-base",
    "revision": None,
    "sha256": None,
    "cache_folder": None,
    "local_files_only": False,
    "device": "auto",
    "devices": None,
    "dtype": "auto",
    "max_length": 512,
    "query_max_length": None,
    "query_truncation_side": "right",
    "max_batch_tokens": None,
    "num_threads": None,
    "capture_graphs": True,
    "max_wait_ms": 0.0,
    "max_queued_tokens": None,
    "normalize": False,
    "query_instruction": None,
    "passage_instruction": None,
    "long_passages": "truncate",
    "window_overlap_tokens": 64,
    "blank_passages": "last",
}
ADAPTER_OPTIONS = CORE_OPTIONS | {
    "normalize": True,
    "top_n": None,
    "score_threshold": None,
    "keep_retrieval_score": False,
    "mark_unread": True,
    "timeout": None,
    "scorer": None,
}
LANGCHAIN_OPTIONS = ADAPTER_OPTIONS | {
    "score_key": "relevance_score",
    "rank_fields": None,
    "document_template": None,
}
LLAMA_INDEX_OPTIONS = ADAPTER_OPTIONS | {"metadata_mode": MetadataMode.EMBED}

SCORER_CALLS = {
    "from_config": "(config)",
    "shared": "(config, holder=None)",
    "ashared": "(config, holder=None)",
    "release": "(holder)",
    "score": "(self, pairs, *, timeout=None, progress=False)",
    "ascore": "(self, pairs, *, timeout=None)",
    "compute_score": "(self, sentence_pairs, *, normalize=None, progress=False)",
    "rank": "(self, query, passages, top_n=None, threshold=None, *, timeout=None, progress=False, normalize=None)",
    "arank": "(self, query, passages, top_n=None, threshold=None, *, timeout=None, normalize=None)",
    "rank_many": "(self, requests, top_n=None, threshold=None, *, timeout=None, progress=False, normalize=None)",
    "arank_many": "(self, requests, top_n=None, threshold=None, *, timeout=None, normalize=None)",
    "warmup": "(self)",
    "awarmup": "(self)",
    "stats": "(self)",
    "health": "(self)",
    "close": "(self, timeout=None)",
}
ADAPTER_CALLS = {
    "model_copy": "(self, *, update=None, deep=False)",
    "warmup": "(self)",
    "awarmup": "(self)",
    "close": "(self)",
}
LANGCHAIN_CALLS = ADAPTER_CALLS | {
    "compress_documents": "(self, documents, query, callbacks=None)",
    "acompress_documents": "(self, documents, query, callbacks=None)",
    "rerank": "(self, documents, query, *, rank_fields=None, top_n=Ellipsis)",
    "arerank": "(self, documents, query, *, rank_fields=None, top_n=Ellipsis)",
    "rerank_many": "(self, requests, *, rank_fields=None, top_n=Ellipsis)",
    "arerank_many": "(self, requests, *, rank_fields=None, top_n=Ellipsis)",
    "as_cross_encoder": "(self)",
}
# The base class's own, which call what this package overrides.
LLAMA_INDEX_CALLS = ADAPTER_CALLS | {
    "postprocess_nodes": "(self, nodes, query_bundle=None, query_str=None)",
    "apostprocess_nodes": "(self, nodes, query_bundle=None, query_str=None)",
}


def call_of(function: Callable[..., Any]) -> str:
    """Return a function's parameters and defaults, without types."""
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_the_names_of_the_package() -> None:
    assert bge_rerank_integrations.__all__ == [
        "AuthenticationError",
        "BGERerankPostprocessor",
        "BGEReranker",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "CorruptCheckpointError",
        "DatasetError",
        "DeviceError",
        "DeviceLostError",
        "ForkedProcessError",
        "HubUnreachableError",
        "InputError",
        "InputTypeError",
        "MissingExtraError",
        "NonFiniteScoreError",
        "QueueFullError",
        "RankedPassage",
        "Ranking",
        "RemoteError",
        "RemoteScorer",
        "RequestTimeoutError",
        "RerankError",
        "Scorer",
        "ScorerClosedError",
        "ScorerConfig",
        "ScorerHealth",
        "ScorerStats",
        "ServerUnreachableError",
        "SupportsRank",
        "UnsupportedCheckpointError",
        "WorkerDiedError",
        "__version__",
    ]


def test_every_error_can_be_imported_from_the_package() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, RerankError)
    }
    assert defined <= set(bge_rerank_integrations.__all__)
    assert defined == set(errors.__all__) - {"missing_extra"}


@pytest.mark.parametrize("made", [ScorerConfig, Scorer])
def test_the_options_of_the_core(made: Callable[..., Any]) -> None:
    parameters = inspect.signature(made).parameters
    assert {name: each.default for name, each in parameters.items()} == CORE_OPTIONS
    positional = [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY]
    assert positional == (["model"] if made is Scorer else [])


@pytest.mark.parametrize(
    ("adapter", "options"), [(BGEReranker, LANGCHAIN_OPTIONS), (BGERerankPostprocessor, LLAMA_INDEX_OPTIONS)]
)
def test_the_options_of_the_adapters(adapter: Any, options: dict[str, Any]) -> None:
    fields = {name: field.default for name, field in adapter.model_fields.items()}
    fields.pop("callback_manager", None)  # the base class's
    assert fields == options


@pytest.mark.parametrize(
    ("owner", "calls"),
    [(Scorer, SCORER_CALLS), (BGEReranker, LANGCHAIN_CALLS), (BGERerankPostprocessor, LLAMA_INDEX_CALLS)],
)
def test_the_calls(owner: type, calls: dict[str, str]) -> None:
    assert {name: call_of(getattr(owner, name)) for name in calls} == calls


def test_no_call_of_a_scorer_is_left_out() -> None:
    public = {name for name, value in vars(Scorer).items() if not name.startswith("_")}
    assert public == set(SCORER_CALLS) | {"config"}
