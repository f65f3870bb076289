"""Answers a question without a language model, with the sentence that fits it best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from bge_rerank_integrations import SupportsRank

# The start of a line that is no part of a paragraph: a heading, a list item, a quotation or a table row.
_LINE_START = re.compile(r"^\s*(?:[-*+>|]|\d+[.)]|#{1,6})\s+", re.MULTILINE)
_FENCE = re.compile(r"^\s*(?:```|~~~).*$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n")


class Quote(NamedTuple):
    """A sentence, its score, and the number of its passage, counted from 1."""

    sentence: str
    passage_number: int
    score: float


def find_quote(scorer: SupportsRank, question: str, passages: Sequence[tuple[str, str]]) -> Quote | None:
    """Return the sentence that fits a question best, by the score of the model that ranks passages.

    Args:
        scorer: Scores sentences as it does passages.
        question: What is asked.
        passages: (heading, text) of each passage to quote from.

    Returns:
        The best sentence, or None if there is none.
    """
    sentences = [
        (number, heading, sentence)
        for number, (heading, text) in enumerate(passages, start=1)
        for sentence in split_sentences(text)
    ]
    # "It is the only metal that ..." says little without the heading.
    best = scorer.rank(question, [f"{heading}: {sentence}" for _, heading, sentence in sentences], top_n=1)
    if not best:
        return None
    number, _, sentence = sentences[best[0].index]
    return Quote(sentence, number, best[0].score)


def split_sentences(text: str) -> list[str]:
    r"""Return the sentences of plain text or Markdown, each on one line and without its markup.

    Example:
        >>> split_sentences("It is **hot**. Is it?\n\n- a list\n- of two")
        ['It is hot.', 'Is it?', 'a list', 'of two']
    """
    plain = _LINE_START.sub("\n\n", _FENCE.sub("\n\n", text))
    plain = _LINK.sub(r"\1", plain).replace("**", "").replace("`", "")
    parts = (" ".join(part.split()).strip(" |") for part in _SENTENCE_END.split(plain))
    return [part for part in parts if any(character.isalnum() for character in part)]


def format_quote(quote: Quote | None) -> str:
    """Return a quote as a line of text, with the number of its source."""
    return "Nothing found." if quote is None else f"“{quote.sentence}” [{quote.passage_number}]"
