"""The command line of the examples: options, errors, times and results."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bge_rerank_integrations import SupportsRank
from bge_rerank_integrations.adapters.options import RerankOptions
from bge_rerank_integrations.errors import RerankError
from examples.embedding import SentenceEmbedder
from examples.folder import DEFAULT_PATHS, FolderError
from examples.store import ChunkStore, Update

NUM_CANDIDATES = 50
DEFAULT_QUESTION = "Which planet is the hottest?"

# Part of the names of index folders. Increase it if an app splits documents in another way.
_INDEX_VERSION = 1


class Source(NamedTuple):
    """A chunk in a printed ranking. `was` is its rank before reranking, counted from 1."""

    label: str
    score: float
    was: int | None = None


class Stages:
    """Measures how long each stage of an app takes."""

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time inside the `with` block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - started) * 1000
            self.elapsed_ms[name] = self.elapsed_ms.get(name, 0.0) + elapsed_ms

    def print(self) -> None:
        """Print one line with all stages."""
        print("\nMilliseconds: " + ", ".join(f"{name} {ms:.0f}" for name, ms in self.elapsed_ms.items()))


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all examples have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can print Chinese characters
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "--folder",
        type=Path,
        nargs="+",
        default=list(DEFAULT_PATHS),
        help="folders or files: Markdown, text, HTML, PDF (default: this repository's documentation)",
    )
    parser.add_argument(
        "--index",
        type=Path,
        default=Path(".rag-index"),
        help="where to keep indexes (default .rag-index); each set of folders has one of its own in it",
    )
    parser.add_argument(
        "--embedding",
        metavar="MODEL",
        help="hub id or folder of an embedding model, to search by meaning beside words",
    )
    parser.add_argument(
        "--model",
        default="embedded",
        help="hub id or folder of a BGE reranker; the default is the small model that comes with the package",
    )
    return parser


def make_rag_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of an app that answers one question, optionally with a language model."""
    parser = _make_question_parser(description)
    parser.add_argument("--compare", action="store_true", help="answer without the reranker, too")
    _add_llm(parser, "language model that answers; without it, a quote does", required=False)
    return parser


def make_agent_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of an agent, which needs a language model."""
    parser = _make_question_parser(description)
    _add_llm(parser, "language model of the agent", required=True)
    return parser


def open_store(args: argparse.Namespace, app: str) -> ChunkStore:
    """Open the index that belongs to an app, a set of folders and an embedding model."""
    embedder = None if args.embedding is None else SentenceEmbedder(args.embedding)
    paths = sorted(str(path.resolve()) for path in args.folder)
    identity = "\0".join([str(_INDEX_VERSION), args.embedding or "", *paths])
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]
    return ChunkStore(args.index / f"{app}-{digest}", embedder)


@contextmanager
def errors_end_the_program() -> Iterator[None]:
    """Print errors of this package inside the block as one line on stderr, and exit with status 1."""
    try:
        yield
    except RerankError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def llm_errors_end_the_program() -> Iterator[None]:
    """Print errors of the client of a language model as one line on stderr, and exit with status 1."""
    try:
        yield
    except RerankError:
        raise
    except Exception as error:  # the errors differ between providers
        sys.exit(f"error: the language model failed: {type(error).__name__}: {error}")


def load_scorer(reranker: RerankOptions) -> SupportsRank:
    """Load the model of a reranker and make a first call, so that later calls do no one-time work."""
    scorer = reranker.resolve_scorer()
    scorer.rank("warm up", ["A passage."])
    return scorer


def make_label(file: str, page: int | None, heading: str) -> str:
    """Return the name of the source of a chunk: its file, and its page or heading."""
    return file + (f", page {page}" if page is not None else "") + (f" > {heading}" if heading else "")


def report_update(update: Update, store: ChunkStore) -> None:
    """Print the result of an update of the index, with the names of skipped files.

    Raises:
        FolderError: The index is empty, since no file could be read.
    """
    for name, reason in update.skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    print(
        f"Index: {len(store)} chunks in {store.folder}; {update.num_indexed} files new or changed, "
        f"{update.num_removed} gone, {len(update.skipped)} skipped"
    )
    if not len(store):
        raise FolderError(f"none of the {len(update.skipped)} files could be read")


def print_sources(heading: str, sources: Sequence[Source]) -> None:
    """Print a ranking under a heading."""
    print(f"\n{heading}")
    for rank, source in enumerate(sources, start=1):
        was = "" if source.was is None else f"   was #{source.was}"
        print(f"  {rank:>3}  {pad(source.label, 72)} {source.score:>8.4f}{was}")


def pad(text: str, width: int) -> str:
    """Cut and pad a text to a width in terminal columns, of which a Chinese character takes two."""
    kept, used = "", 0
    for character in text:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > width:
            break
        kept, used = kept + character, used + columns
    return kept + " " * (width - used)


def _make_question_parser(description: str) -> argparse.ArgumentParser:
    parser = make_parser(description)
    parser.add_argument("question", nargs="?", default=DEFAULT_QUESTION)
    parser.add_argument("--top-n", type=_positive, default=5, help="passages to keep (default 5)")
    return parser


def _add_llm(parser: argparse.ArgumentParser, text: str, *, required: bool) -> None:
    parser.add_argument("--llm", metavar="PROVIDER:NAME", required=required, help=text)
    parser.add_argument(
        "--llm-url",
        metavar="URL",
        help="address of a server of your own that speaks OpenAI's protocol, for --llm openai:NAME",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer of at least 1")
    return int(text)
