"""`python -m training`: each step from the pinned sources to the packed model; see README.md."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from training import dataset, pack, sources, student, table
from training.distill import Schedule, distill
from training.original import NUM_LAYERS, Original, read_weights

CACHE = click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("training-cache"), show_default=True
)
# Every second layer, the first and the last among them: what is between two is learned by the first.
HALF = (0, 2, 4, 7, 9, 11)


@click.group()
def main() -> None:
    """Make the embedded model."""
    torch.manual_seed(0)


@main.command("pairs")
@CACHE
@click.option(
    "--scifact",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="SciFact's folder, as BEIR publishes it.",
)
def make_pairs(cache: Path, scifact: Path) -> None:
    """Make pairs from the sources."""
    pairs = dataset.make(cache, scifact)
    pairs.save(cache / "pairs.npz")
    click.echo(f"{len(pairs.queries)} pairs")


@main.command()
@CACHE
@click.option("--num-pairs", default=16_000, show_default=True)
@click.option("--learning-rate", default=5e-5, show_default=True)
def whole(cache: Path, num_pairs: int, learning_rate: float) -> None:
    """Move the original into the XLM-RoBERTa architecture, as it is and with some training."""
    weights, vocabulary = _original(cache)
    model = student.create(weights, vocabulary, range(NUM_LAYERS))
    student.save(model, vocabulary, cache / "12-layers-untrained")
    schedule = Schedule(num_pairs=num_pairs, learning_rate=learning_rate)
    pairs = dataset.load(cache / "pairs.npz")
    distill(model, Original(weights), range(NUM_LAYERS), vocabulary, pairs, schedule)
    student.save(model, vocabulary, cache / "12-layers")


@main.command()
@CACHE
@click.option("--num-pairs", default=40_000, show_default=True)
@click.option("--learning-rate", default=1e-4, show_default=True)
def half(cache: Path, num_pairs: int, learning_rate: float) -> None:
    """Train half of the layers; `whole` comes first."""
    weights, vocabulary = _original(cache)
    model = student.create(weights, vocabulary, range(NUM_LAYERS))
    model.load_state_dict(load_file(cache / "12-layers" / "model.safetensors"))
    model = student.keep_layers(model, HALF)
    schedule = Schedule(num_pairs=num_pairs, learning_rate=learning_rate)
    pairs = dataset.load(cache / "pairs.npz")
    distill(model, Original(weights), HALF, vocabulary, pairs, schedule)
    student.save(model, vocabulary, cache / "6-layers")


@main.command("pack")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def pack_command(source: Path, target: Path) -> None:
    """Store a checkpoint's matrices as int8."""
    pack.pack(source, target)


@main.command("table")
@CACHE
@click.option("--data", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--every", default=1, show_default=True, help="Take every n-th query only.")
@click.argument("checkpoints", nargs=-1, type=click.Path(exists=True, path_type=Path))
def table_command(
    cache: Path, data: tuple[Path, ...], dtype: str, every: int, checkpoints: tuple[Path, ...]
) -> None:
    """Compare checkpoints with the original on BEIR folders, BM25 first."""
    click.echo(table.format_table(data, table.make_table(cache, data, checkpoints, dtype=dtype, every=every)))


def _original(cache: Path) -> tuple[dict[str, Tensor], student.Vocabulary]:
    folder = sources.fetch_model(cache)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return read_weights(folder / "model.onnx"), student.Vocabulary(tokenizer)


if __name__ == "__main__":
    main()
