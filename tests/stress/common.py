"""The model and texts that the stress tests share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from bge_rerank_integrations import Scorer, ScorerConfig
from bge_rerank_integrations.text.tokenization import PairTokenizer

MAX_DIFFERENCE: Final = 1e-5
# Ten times longer than any wait should take. A wait that exceeds this time hangs.
PATIENCE_S: Final = 60.0


@dataclass(frozen=True)
class Bench:
    """The model and texts that the stress tests share.

    Attributes:
        folder: Temporary folder.
        checkpoint: Folder of a small model with random weights.
        scorer: The same model, loaded on the CPU in float32.
        texts: Passages in English and Chinese.
    """

    folder: Path
    checkpoint: Path
    scorer: Scorer
    texts: list[str]

    def passages(self, count: int) -> list[str]:
        """Return `count` distinct passages."""
        return [f"{self.texts[n % len(self.texts)]} {n}" for n in range(count)]

    def phrases(self) -> list[str]:
        """Return distinct short passages, of 1 to 12 words."""
        words = [text.split() for text in self.texts]
        return list(
            dict.fromkeys(" ".join(row[n : n + 1 + n % 12]) for row in words for n in range(len(row)))
        )

    def tokenizer(self) -> PairTokenizer:
        """Return a new tokenizer for the checkpoint."""
        return PairTokenizer(self.checkpoint / "tokenizer.json", ScorerConfig())


def overflowing_checkpoint(bench: Bench, word: str) -> tuple[Path, int]:
    """Copy the checkpoint with a word embedding that overflows. Return the folder and the word's id."""
    folder = bench.folder / "overflowing"
    if not folder.exists():
        shutil.copytree(bench.checkpoint, folder)
    (pair,) = bench.tokenizer().encode([""], [word])
    word_id = int(pair.windows[0][3])
    tensors = read_tensors(bench.checkpoint)
    tensors["roberta.embeddings.word_embeddings.weight"][word_id] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, word_id


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return copies of a checkpoint's tensors, so that the file is no longer mapped."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest absolute difference between two lists of scores."""
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def check(holds: bool, measured: str) -> None:
    """Print what a test measured, and fail the test unless it holds."""
    print(f"\n{measured}")
    assert holds, measured
