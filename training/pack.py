"""Packs a float32 checkpoint to a quarter of its size: matrices as int8 with one scale per row."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix. Return int8 values [rows, columns] and float32 scales [rows, 1]."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


def pack(source: Path, target: Path) -> None:
    """Write a packed copy of a checkpoint. The classification head and all vectors stay in float32."""
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
