"""Queries generated from documents, with passages that BM25 finds for them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import bm25s

from training.texts import Document


class Group(NamedTuple):
    """One query and the passages to score with it."""

    query: str
    passages: list[str]


_WORD = re.compile(r"[^\W_]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
_QUESTIONS = ("what is {}?", "what is {}", "how does {} work?", "{} meaning", "why {}?", "which {}?")
_NUM_CANDIDATES = 50
_NUM_NEAR = 3  # out of BM25's best ten passages
_NUM_FAR = 2  # out of BM25's other forty passages
_MAX_WORDS = 220


def make_groups(documents: Sequence[Document], count: int, *, seed: int) -> list[Group]:
    """Return `count` queries, each with a passage of its document, five that BM25 finds and a random one."""
    rng = random.Random(seed)
    texts = [f"{document.title} {document.text}" for document in documents]
    frequencies = Counter(word for text in texts for word in set(_words(text)))
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
    chosen = [rng.randrange(len(documents)) for _ in range(count)]
    queries = [_query(documents[index], frequencies, rng) for index in chosen]
    tokens = bm25s.tokenize(queries, stopwords=None, show_progress=False)
    found, _ = retriever.retrieve(tokens, k=min(_NUM_CANDIDATES, len(texts)), show_progress=False)
    groups = []
    for query, own, candidates in zip(queries, chosen, found.tolist(), strict=True):
        others = [index for index in candidates if index != own]
        near, far = others[:10], others[10:]
        picked = [own, *rng.sample(near, _NUM_NEAR), *rng.sample(far, _NUM_FAR), rng.randrange(len(texts))]
        groups.append(Group(query, [_passage(documents[index], rng) for index in picked]))
    return groups


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _query(document: Document, frequencies: Counter[str], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return document.title
    if kind < 0.65:
        words = rng.choice(_SENTENCE.split(document.text)).split()
        start = rng.randrange(max(len(words) - 8, 1))
        return " ".join(words[start : start + rng.randint(5, 18)])
    if kind < 0.85:
        rare = sorted(set(_words(document.text)), key=lambda word: (frequencies[word], word))[:12]
        return " ".join(rng.sample(rare, min(len(rare), rng.randint(2, 5))))
    return rng.choice(_QUESTIONS).format(document.title.rstrip(".").lower())


def _passage(document: Document, rng: random.Random) -> str:
    """Return a random part of a document, so that passages vary in length. Half of them keep the title."""
    sentences = _SENTENCE.split(document.text)
    start = rng.randrange(len(sentences)) if rng.random() < 0.4 else 0
    words = " ".join(sentences[start:]).split()[: rng.randint(25, _MAX_WORDS)]
    return " ".join([document.title, *words] if rng.random() < 0.5 else words)
