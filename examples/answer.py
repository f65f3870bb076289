"""What the examples share: corpus, first stage, an answer without a language model, command line."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bge_rerank_integrations.adapter_options import RerankOptions
from bge_rerank_integrations.errors import RerankError, missing_extra
from bge_rerank_integrations.scorer import SupportsRank

try:
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
except ImportError as error:
    raise missing_extra("examples", "bm25s") from error

CORPUS = Path(__file__).with_name("corpus.jsonl")
DEFAULT_QUESTION = "Which planet is the hottest?"
NUM_CANDIDATES = 20

# Chinese is written without spaces; single characters and words of other scripts are told apart here.
_WORD = re.compile(r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class Passage:
    """A line of the corpus."""

    id: str
    title: str
    text: str


class Result(NamedTuple):
    """A passage in a ranking, as it is printed; `was` is its rank in the first stage, from 1."""

    title: str
    score: float
    was: int | None = None


class Quote(NamedTuple):
    """A sentence, the title of the passage it stands in and its own score."""

    sentence: str
    title: str
    score: float


class KeywordSearch:
    """BM25 over the titles and texts of passages."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = passages
        self._index = bm25s.BM25()
        self._index.index([split_words(f"{p.title} {p.text}") for p in passages], show_progress=False)

    def search(self, question: str, num_results: int) -> list[tuple[Passage, float]]:
        """Return the passages that share words with a question and their scores, best first."""
        words = split_words(question)
        if not words:
            return []
        scored = zip(self._passages, map(float, self._index.get_scores(words)), strict=True)
        found = [(passage, score) for passage, score in scored if score > 0]
        return sorted(found, key=lambda pair: -pair[1])[:num_results]


def read_corpus() -> list[Passage]:
    """Return the passages of `corpus.jsonl`."""
    with CORPUS.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Passage(row["_id"], row["title"], row["text"]) for row in rows]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case without stop words, and pairs of Chinese characters.

    Example:
        >>> split_words("The panda: 大熊猫")
        ['panda', '大熊', '熊猫']
    """
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        if "\u4e00" <= word[0] <= "\u9fff":
            words.extend(word[start : start + 2] for start in range(max(1, len(word) - 1)))
        elif word not in STOPWORDS_EN:
            words.append(word)
    return words


def find_quote(scorer: SupportsRank, question: str, passages: Iterable[tuple[str, str]]) -> Quote | None:
    """Return the sentence that fits a question best, by the score of the model that ranks passages.

    Args:
        scorer: Scores sentences as it does passages.
        question: What is asked.
        passages: (title, text) of each passage to quote from.

    Returns:
        The best sentence; None where there is none.
    """
    sentences = [
        (title, sentence.strip())
        for title, text in passages
        for sentence in _SENTENCE_END.split(text)
        if sentence.strip()
    ]
    # "It is the only metal that ..." says little without the title.
    best = scorer.rank(question, [f"{title}: {sentence}" for title, sentence in sentences], top_n=1)
    if not best:
        return None
    title, sentence = sentences[best[0].index]
    return Quote(sentence, title, best[0].score)


def format_quote(quote: Quote | None) -> str:
    """Return a quote with its source as a line of text."""
    if quote is None:
        return "Nothing found."
    return f"“{quote.sentence}”\n    from {quote.title} (score {quote.score:.4f})"


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all examples have."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has Chinese characters
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--model",
        default="embedded",
        help="hub id or folder of a BGE reranker; the default is the small model that comes with the package",
    )
    parser.add_argument("--top-n", type=_positive, default=5, help="passages to show (default 5)")
    return parser


def make_rag_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of an app that answers one question."""
    parser = make_parser(description)
    parser.add_argument("question", nargs="?", default=DEFAULT_QUESTION)
    parser.add_argument(
        "--llm", metavar="PROVIDER:NAME", help="language model that answers; without it, a quote does"
    )
    return parser


@contextmanager
def errors_end_the_program() -> Iterator[None]:
    """Turn this package's own errors inside the block into a line on stderr and exit status 1."""
    try:
        yield
    except RerankError as error:
        sys.exit(f"error: {error}")


def load_scorer(reranker: RerankOptions) -> SupportsRank:
    """Load the model of a reranker, and make the first call, which pays for what happens once."""
    scorer = reranker.resolve_scorer()
    scorer.rank("warm up", ["A passage."])
    return scorer


class Timer:
    """Measures the time inside a `with` block as `elapsed_ms`."""

    elapsed_ms = 0.0

    def __enter__(self) -> Timer:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.elapsed_ms = (time.perf_counter() - self._start) * 1000


def print_results(heading: str, results: Sequence[Result]) -> None:
    """Print a ranking under a heading."""
    print(f"\n{heading}")
    for rank, result in enumerate(results, start=1):
        was = "" if result.was is None else f"   was #{result.was}"
        print(f"  {rank:>3}  {pad(result.title, 32)} {result.score:>9.4f}{was}")


def pad(text: str, width: int) -> str:
    """Cut and pad a text to a width in terminal columns, of which a Chinese character takes two."""
    kept, used = "", 0
    for character in text:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > width:
            break
        kept, used = kept + character, used + columns
    return kept + " " * (width - used)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be an integer of at least 1")
    return int(text)
