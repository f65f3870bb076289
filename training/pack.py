"""A checkpoint in float32 to one a quarter of the size: matrices as int8 with a scale for each row."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [rows, columns] and float32 scales [rows, 1] whose product is close to a matrix."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


def pack(source: Path, target: Path) -> None:
    """Write a packed copy of a checkpoint; the head and all vectors keep float32."""
    target.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and not name.startswith("classifier."):
            packed[name], packed[f"{name}_scale"] = quantize_rows(tensor.float())
        else:
            packed[name] = tensor.float()
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source / name, target / name)
