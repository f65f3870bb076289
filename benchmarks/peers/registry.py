"""The list of contenders, and how to load them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Final, NamedTuple, TypeVar, get_args

from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, NotAvailableError
from bge_rerank_integrations.config import DType

T = TypeVar("T")


class Entry(NamedTuple):
    """How to load a contender.

    Attributes:
        module: Name of the module in `benchmarks.peers`.
        kind: First argument of the load function: a precision, `default`, `best` or `best-float32`.
        install: Packages to install if the contender is missing.
        load: Name of the function that loads the contender.
        converts: Whether the module has a function `prepare` that converts the model first.
    """

    module: str
    kind: str
    install: str
    load: str = "load"
    converts: bool = False


OURS: Final = [f"ours-{dtype}" for dtype in get_args(DType) if dtype != "auto"]
REFERENCE: Final = "ours-float32"
BASELINE: Final = "cross-encoder-default"

_SENTENCE_TRANSFORMERS: Final = "sentence-transformers"
_LANGCHAIN: Final = "langchain-classic langchain-community sentence-transformers"
_LLAMA_INDEX: Final = "llama-index-core sentence-transformers"

ENTRIES: Final = {
    **{key: Entry("ours", key.removeprefix("ours-"), "bge-rerank-integrations") for key in OURS},
    "cross-encoder-default": Entry("cross_encoder", "default", _SENTENCE_TRANSFORMERS),
    "cross-encoder-best": Entry("cross_encoder", "best", _SENTENCE_TRANSFORMERS),
    "cross-encoder-best-float32": Entry("cross_encoder", "best-float32", _SENTENCE_TRANSFORMERS),
    "flag-reranker-default": Entry("flag_reranker", "default", "FlagEmbedding"),
    "flag-reranker-best": Entry("flag_reranker", "best", "FlagEmbedding"),
    "onnx-float32": Entry("onnx_runtime", "float32", "onnx onnxruntime", converts=True),
    "onnx-int8": Entry("onnx_runtime", "int8", "onnx onnxruntime", converts=True),
    "openvino-float32": Entry("open_vino", "float32", "openvino", converts=True),
    "openvino-bfloat16": Entry("open_vino", "bfloat16", "openvino", converts=True),
    "openvino-int8": Entry("open_vino", "int8", "openvino nncf", converts=True),
    "langchain-ours": Entry("ours", "auto", "langchain-core", "load_langchain"),
    "langchain-theirs": Entry("langchain_reranker", "default", _LANGCHAIN),
    "llama-index-ours": Entry("ours", "auto", "llama-index-core", "load_llama_index"),
    "llama-index-theirs": Entry("llama_index_reranker", "default", _LLAMA_INDEX),
}


def is_ours(key: str) -> bool:
    """Return whether a contender is this package."""
    return ENTRIES[key].module == "ours"


def select(wanted: Sequence[str], among: Collection[str] = ENTRIES) -> list[str]:
    """Return the contenders selected by names. A name is a contender's key or a prefix of keys.

    Raises:
        ValueError: A name selects no contender.
    """
    for name in wanted:
        if not any(_means(name, key) for key in among):
            raise ValueError(f"no contender {name!r}; choose from {', '.join(among)}")
    return [key for key in among if any(_means(name, key) for name in wanted)]


def load(key: str, setup: Setup, stack: ExitStack) -> Contender:
    """Load one contender.

    Raises:
        NotAvailableError: The contender is not installed, or this machine cannot run it.
    """
    entry = ENTRIES[key]
    try:
        loader: Callable[[str, Setup, ExitStack], Contender] = getattr(_module(entry), entry.load)
        return loader(entry.kind, setup, stack)
    except ImportError as error:
        raise NotAvailableError(f"pip install {entry.install}  ({error})") from error


def load_all(
    keys: Sequence[str], setup: Setup, stack: ExitStack
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Load the contenders that are available. Return them, and the reasons why others are not available."""
    contenders: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for key in keys:
        loaded = available(partial(load, key, setup, stack))
        if isinstance(loaded, str):
            missing[key] = loaded
        else:
            contenders[key] = loaded
    return contenders, missing


def available(get: Callable[[], T]) -> T | str:
    """Return the result of a function, or the message if it raises `NotAvailableError`."""
    try:
        return get()
    except NotAvailableError as error:
        return str(error)


def needs_preparing(key: str) -> bool:
    """Return whether a contender converts the model into its own files before it loads them."""
    return ENTRIES[key].converts


def prepare(key: str, setup: Setup) -> None:
    """Convert the model for a contender, so that the memory of loading can be measured separately.

    Raises:
        NotAvailableError: The contender is not installed.
    """
    entry = ENTRIES[key]
    try:
        convert: Callable[[str, Setup], object] = _module(entry).prepare
        convert(entry.kind, setup)
    except ImportError as error:
        raise NotAvailableError(f"pip install {entry.install}  ({error})") from error


def _means(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}-")


def _module(entry: Entry) -> ModuleType:
    return importlib.import_module(f"benchmarks.peers.{entry.module}")
