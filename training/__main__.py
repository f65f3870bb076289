"""`python -m training`: each step from the pinned sources to the packed model; see README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import XLMRobertaForSequenceClassification

from training import labels, pack, sources, student, table
from training.distill import Schedule, distill

CACHE = click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("training-cache"), show_default=True
)
# Every second layer, the first and the last among them: what is between two is learned by the first.
HALF = (0, 2, 4, 7, 9, 11)


@click.group()
def main() -> None:
    """Make the embedded model."""
    torch.manual_seed(0)


@main.command("labels")
@CACHE
def make_labels(cache: Path) -> None:
    """Make pairs from the sources and score them with the original."""
    labels.make(cache).save(cache / "labels.npz")


@main.command()
@CACHE
@click.option("--num-pairs", default=6000, show_default=True)
@click.option("--learning-rate", default=3e-5, show_default=True)
def whole(cache: Path, num_pairs: int, learning_rate: float) -> None:
    """Move the original into the XLM-RoBERTa architecture, as it is and with some training."""
    vocabulary = _vocabulary(cache)
    model = student.create(sources.fetch_model(cache), vocabulary, range(12))
    student.save(model, vocabulary, cache / "12-layers-untrained")
    _distill(model, vocabulary, cache, Schedule(num_pairs=num_pairs, learning_rate=learning_rate))
    student.save(model, vocabulary, cache / "12-layers")


@main.command()
@CACHE
@click.option("--num-pairs", default=40_000, show_default=True)
@click.option("--learning-rate", default=1e-4, show_default=True)
def half(cache: Path, num_pairs: int, learning_rate: float) -> None:
    """Train half of the layers; `whole` comes first."""
    vocabulary = _vocabulary(cache)
    guide = student.create(sources.fetch_model(cache), vocabulary, range(12))
    guide.load_state_dict(load_file(cache / "12-layers" / "model.safetensors"))
    model = student.keep_layers(guide, HALF)
    schedule = Schedule(num_pairs=num_pairs, learning_rate=learning_rate)
    _distill(model, vocabulary, cache, schedule, guide=guide, guide_layers=HALF)
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


def _vocabulary(cache: Path, size: int | None = None) -> student.Vocabulary:
    tokenizer = json.loads((sources.fetch_model(cache) / "tokenizer.json").read_text(encoding="utf-8"))
    return student.Vocabulary(tokenizer, np.zeros(len(tokenizer["model"]["vocab"]), np.int64).tolist(), size)


def _distill(
    model: XLMRobertaForSequenceClassification,
    vocabulary: student.Vocabulary,
    cache: Path,
    schedule: Schedule,
    *,
    guide: XLMRobertaForSequenceClassification | None = None,
    guide_layers: Sequence[int] = (),
) -> None:
    found = labels.load(cache / "labels.npz")
    queries, passages = (
        [vocabulary.remap(ids) for ids in texts] for texts in (found.queries, found.passages)
    )
    distill(model, found, (queries, passages), schedule, guide=guide, guide_layers=guide_layers)


if __name__ == "__main__":
    main()
