"""The examples, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.answer import KeywordSearch, format_quote, read_corpus, split_words
from examples.random_checkpoint import SPECIAL_TOKENS, TOKENIZER, read_texts, train_tokenizer

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"examples.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("module", ["langchain_rag", "llama_index_rag"])
def test_a_rag_app_answers_without_key_hub_or_model(module: str) -> None:
    result = run(module, "Which planet is the hottest?", "--top-n", "3")
    assert result.returncode == 0, result.stderr
    for part in ("Question: Which planet", "Before: BM25, 3 of", "After: BGERer", "Answer: “", "from Venus"):
        assert part in result.stdout
    assert max(map(len, result.stdout.splitlines()[:12])) <= 110


@pytest.mark.parametrize("module", ["langchain_rag", "llama_index_rag"])
def test_a_rag_app_takes_another_model(module: str, checkpoint: Path) -> None:
    result = run(module, "--model", str(checkpoint))
    assert result.returncode == 0, result.stderr
    assert "Answer: " in result.stdout


@pytest.mark.parametrize("module", ["langchain_rag", "llama_index_rag"])
def test_an_error_is_one_line_that_says_what_to_do(module: str) -> None:
    result = run(module, "--model", "/no/such/folder")
    assert result.returncode == 1
    assert result.stderr.strip() == "error: model folder '/no/such/folder' does not exist"


def test_the_first_stage_finds_words_in_both_languages() -> None:
    search = KeywordSearch(read_corpus())
    assert [passage.title for passage, _ in search.search("king cobra venom", 1)] == ["King cobra"]
    assert [passage.title for passage, _ in search.search("光合作用", 1)] == ["光合作用"]
    assert search.search("the", 5) == []
    assert split_words("The panda: 大熊猫") == ["panda", "大熊", "熊猫"]
    assert format_quote(None) == "Nothing found."


def test_the_shipped_tokenizer_is_one_that_training_gives() -> None:
    from tokenizers import Tokenizer

    shipped = Tokenizer.from_file(str(TOKENIZER))
    trained = train_tokenizer(read_texts())
    # Scores, and so the order of ids, differ a little each time; the pieces do not.
    assert len(set(shipped.get_vocab()) & set(trained.get_vocab())) > 0.95 * trained.get_vocab_size()
    assert [shipped.id_to_token(token_id) for token_id in range(5)] == SPECIAL_TOKENS
