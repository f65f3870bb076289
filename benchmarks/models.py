"""The model that all contenders load, in the format that each contender reads."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.common import Pairs, spread
from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine.checkpoint.locate import find_checkpoint
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.checkpoint.weights import load_weights
from bge_rerank_integrations.engine.shape import EncoderShape
from examples.random_checkpoint import TOKENIZER_CONFIG, build_random_checkpoint

SHAPES: Final[dict[str, dict[str, int]]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128},
    # Small enough for a CPU to serve, and large enough that the model takes most of the time.
    "small": {"num_layers": 6, "hidden_size": 384, "num_heads": 12, "intermediate_size": 1536},
    "base": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 250_002,
    },
    "large": {
        "num_layers": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 250_002,
    },
}

_CALIBRATION_PAIRS: Final = 32


@dataclass(frozen=True)
class Setup:
    """The model and device that contenders are loaded with.

    Attributes:
        model: The model as `Scorer` accepts it.
        plain: Folder with the same weights in float32, which transformers can read.
        device: `cpu`, `cuda` or `cuda:N`.
        exports: Folder for the converted models of peers.
        sample: Pairs for the calibration of a quantization.
    """

    model: str
    plain: Path
    device: str
    exports: Path
    sample: Pairs

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer that all contenders use."""
        return self.plain / "tokenizer.json"

    def calibrated_with(self, pairs: Pairs) -> Setup:
        """Return a setup whose quantizations are calibrated with an even sample of these pairs."""
        return replace(self, sample=spread(pairs, _CALIBRATION_PAIRS))

    def shape(self) -> EncoderShape:
        """Return the model's dimensions."""
        return read_shape(self.plain)


@contextmanager
def prepared_model(
    *, shape: str, model: str | None, device: str, tokenizer: Path | None = None
) -> Iterator[Setup]:
    """Create a model with random weights, or copy a model, in a temporary folder.

    Args:
        shape: Name of the shape of a model with random weights.
        model: The model to copy, as `Scorer` accepts it. None means random weights.
        device: Device that contenders run on.
        tokenizer: A `tokenizer.json` to use with random weights instead of the small one of the examples.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain, exports = Path(folder) / "model", Path(folder) / "exports"
        exports.mkdir()
        if model is None:
            _build_random(plain, SHAPES[shape], tokenizer)
        else:
            write_plain(find_checkpoint(ScorerConfig(model=model)), plain)
        yield Setup(model or str(plain), plain, device, exports, [])


def chosen_model(args: argparse.Namespace) -> AbstractContextManager[Setup]:
    """Return `prepared_model` for the options of a command."""
    return prepared_model(shape=args.shape, model=args.model, device=args.device)


def _build_random(folder: Path, sizes: dict[str, int], tokenizer: Path | None) -> None:
    if tokenizer is None:
        build_random_checkpoint(folder, **sizes)
        return
    parsed = Tokenizer.from_file(str(tokenizer))
    # Files on the hub often contain settings for padding and truncation, which are not part of the model.
    parsed.no_padding()
    parsed.no_truncation()
    vocab_size = max(sizes.get("vocab_size", 0), parsed.get_vocab_size())
    build_random_checkpoint(folder, **{**sizes, "vocab_size": vocab_size})
    parsed.save(str(folder / "tokenizer.json"))


def write_plain(source: Path, folder: Path) -> None:
    """Write a checkpoint in float32, with a tokenizer configuration that all peers read in the same way.

    Without it, peers would compute in the precision that the weights are stored in, and would choose a
    tokenizer class by the model's type instead of using `tokenizer.json`.
    """
    folder.mkdir()
    weights = load_weights(source, read_shape(source), device=torch.device("cpu"), dtype=torch.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), encoding="utf-8")
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
