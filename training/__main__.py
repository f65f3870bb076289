"""`python -m training`: the steps from the pinned sources to the packed model; see README.md."""

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
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("training-cache"),
    show_default=True,
    help="Folder for downloads and intermediate files.",
)
# About every second layer, including the first and the last. Each layer also learns the work of the layers
# that were removed before it.
HALF = (0, 2, 4, 7, 9, 11)


@click.group()
def main() -> None:
    """Train the embedded model, step by step."""
    torch.manual_seed(0)


@main.command("pairs")
@CACHE
@click.option(
    "--scifact",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Folder of SciFact as BEIR publishes it.",
)
def make_pairs(cache: Path, scifact: Path) -> None:
    """Generate training pairs from the sources."""
    pairs = dataset.make(cache, scifact)
    pairs.save(cache / "pairs.npz")
    click.echo(f"{len(pairs.queries)} pairs")


@main.command()
@CACHE
@click.option("--num-pairs", default=16_000, show_default=True)
@click.option("--learning-rate", default=5e-5, show_default=True)
def whole(cache: Path, num_pairs: int, learning_rate: float) -> None:
    """Convert the original to the XLM-RoBERTa architecture, and train the result."""
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
    """Train a model with half of the layers. Run `whole` first."""
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
    """Copy the checkpoint SOURCE to TARGET with its matrices stored as int8."""
    pack.pack(source, target)


@main.command("table")
@CACHE
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="BEIR folder; can be repeated.",
)
@click.option("--dtype", default="float32", show_default=True, help="Precision of CHECKPOINTS.")
@click.option("--every", default=1, show_default=True, help="Use only every n-th query.")
@click.argument("checkpoints", nargs=-1, type=click.Path(exists=True, path_type=Path))
def table_command(
    cache: Path, data: tuple[Path, ...], dtype: str, every: int, checkpoints: tuple[Path, ...]
) -> None:
    """Compare CHECKPOINTS with the original and with BM25 on BEIR folders."""
    click.echo(table.format_table(data, table.make_table(cache, data, checkpoints, dtype=dtype, every=every)))


def _original(cache: Path) -> tuple[dict[str, Tensor], student.Vocabulary]:
    folder = sources.fetch_model(cache)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return read_weights(folder / "model.onnx"), student.Vocabulary(tokenizer)


if __name__ == "__main__":
    main()
