"""The tokenizer that lies beside the examples."""

from __future__ import annotations

from examples.random_checkpoint import SPECIAL_TOKENS, TOKENIZER, read_texts, train_tokenizer


def test_the_shipped_tokenizer_is_one_that_training_gives() -> None:
    from tokenizers import Tokenizer

    shipped = Tokenizer.from_file(str(TOKENIZER))
    trained = train_tokenizer(read_texts())
    # Scores, and so the order of ids, differ a little each time; the pieces do not.
    assert len(set(shipped.get_vocab()) & set(trained.get_vocab())) > 0.95 * trained.get_vocab_size()
    assert [shipped.id_to_token(token_id) for token_id in range(5)] == SPECIAL_TOKENS
