"""Create a checkpoint with random weights, so that the examples and tests run without a model hub.

The checkpoint has the architecture of `BAAI/bge-reranker-base` and a working tokenizer, so it runs through
the same code. Its scores mean nothing.

    python -m examples.random_checkpoint FOLDER

The tokenizer is in this folder. It was trained on `corpus.jsonl` with `train_tokenizer(read_texts())`.
Training gives a slightly different tokenizer each time, and tests need the same tokens each time.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

CORPUS = Path(__file__).with_name("corpus.jsonl")
TOKENIZER = Path(__file__).with_name("tokenizer.json")
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# The settings of the published checkpoints, except for the class. Without the class, transformers 5 would
# create an XLMRobertaTokenizer from the vocabulary, and drop a normalizer other than that of SentencePiece.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def build_random_checkpoint(
    folder: Path,
    *,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    intermediate_size: int = 128,
    max_position_embeddings: int = 514,
    vocab_size: int | None = None,
    seed: int = 0,
) -> Path:
    """Write config.json, the tokenizer's files and model.safetensors to a folder.

    Args:
        folder: Folder to write to. It is created if it does not exist.
        num_layers: Number of encoder layers.
        hidden_size: Width of the encoder.
        num_heads: Number of attention heads.
        intermediate_size: Width of the feed-forward layers.
        max_position_embeddings: Rows of the position embedding, which is the longest input in tokens plus 2.
        vocab_size: Rows of the word embedding; None for the size of the tokenizer's vocabulary.
        seed: Seed of the random weights.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TOKENIZER, folder / TOKENIZER.name)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
    config = XLMRobertaConfig(
        vocab_size=vocab_size or Tokenizer.from_file(str(TOKENIZER)).get_vocab_size(),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=hidden_size**-0.5,  # so that attention and scores vary with the input
        id2label={0: "relevance"},
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLMRobertaForSequenceClassification(config)
        # Attention then selects tokens instead of averaging them, and the logits differ clearly.
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("self.query.weight"):
                    weight.mul_(4.0)
            model.classifier.out_proj.weight.mul_(3.0)
    model.save_pretrained(folder)
    return folder


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a Unigram tokenizer that splits and frames text as XLM-RoBERTa's does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=2000, special_tokens=SPECIAL_TOKENS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def read_texts() -> list[str]:
    """Return the passages of the example corpus, each with its title in front."""
    with CORPUS.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row['title']}\n{row['text']}" for row in rows]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.random_checkpoint FOLDER")
    print(build_random_checkpoint(Path(sys.argv[1])))
