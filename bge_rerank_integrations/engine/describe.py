"""What this machine would run a model with, and what a checkpoint on it holds, without loading either."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.checkpoint import (
    check_max_length,
    find_checkpoint,
    fingerprint,
    read_shape,
)
from bge_rerank_integrations.engine.device import resolve_device, resolve_dtype, resolve_max_batch_tokens
from bge_rerank_integrations.engine.linear import resolve_linear

# All BGE rerankers have heads of this width, on which the choice of attention depends.
_BGE_HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """What a config comes to on this machine.

    Attributes:
        device: Such as `cpu`, `cuda:0` or, where a config names several, `cuda:0, cuda:1`.
        device_name: What the vendor calls it, or the first of them, which all that follows is about.
        device_reason: Why this one.
        dtype: Precision of the encoder.
        dtype_reason: Why this one.
        attention: Implementation of attention.
        attention_reason: What it does.
        linear: Implementation of linear layers.
        linear_reason: What it does.
        threads: CPU threads that compute.
        threads_reason: Why so many.
        cores: CPU cores that there are.
        max_batch_tokens: Most tokens in one forward pass.
        bfloat16: Whether the device computes in bfloat16 faster than in float32; None if unknown.
        python: Version.
        torch: Version.
    """

    device: str
    device_name: str
    device_reason: str
    dtype: str
    dtype_reason: str
    attention: str
    attention_reason: str
    linear: str
    linear_reason: str
    threads: int
    threads_reason: str
    cores: int
    max_batch_tokens: int
    bfloat16: bool | None
    python: str
    torch: str


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes:
        folder: Where it lies.
        num_bytes: Size of its files.
        num_parameters: Weights of the model.
        num_layers: Encoder layers.
        hidden_size: Their width.
        vocab_size: Pieces of the tokenizer.
        max_length: Longest pair it takes, in tokens.
        fingerprint: What tells it from another checkpoint; a digest of parts of it.
    """

    folder: str
    num_bytes: int
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    fingerprint: str


def describe_machine(config: ScorerConfig) -> MachineReport:
    """Return what a config comes to on this machine.

    Raises:
        ConfigError: The precision does not go with the device.
        DeviceError: The device is not there.
    """
    devices = [resolve_device(each) for each in config.per_device()]
    device = devices[0]
    dtype = resolve_dtype(config, device)
    chosen = "chosen"
    attention = resolve_attention(device, dtype, _BGE_HEAD_DIM)
    linear = resolve_linear(device, dtype).make
    return MachineReport(
        device=", ".join(map(str, devices)),
        device_name=_device_name(device),
        device_reason=_why_device(device) if config.device == "auto" and not config.devices else chosen,
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=f"default on {device.type}" if config.dtype == "auto" else chosen,
        attention=_name(attention),
        attention_reason=_summary(attention),
        linear=_name(linear),
        linear_reason=_summary(linear),
        threads=config.num_threads or torch.get_num_threads(),
        threads_reason=chosen if config.num_threads else "torch's choice",
        cores=os.cpu_count() or 1,
        max_batch_tokens=resolve_max_batch_tokens(config, device),
        bfloat16=_has_fast_bfloat16(device),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def describe_checkpoint(config: ScorerConfig) -> CheckpointReport:
    """Return what a checkpoint holds, as far as its config and file sizes tell; asks no hub.

    Raises:
        CheckpointError: It is not on this machine, or no reranker.
        ConfigError: The config wants longer pairs than it takes.
    """
    folder = find_checkpoint(ScorerConfig.from_dict({**config.to_dict(), "local_files_only": True}))
    shape = read_shape(folder)
    check_max_length(config, shape)
    return CheckpointReport(
        folder=str(folder),
        num_bytes=sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file()),
        num_parameters=sum(math.prod(dimensions) for dimensions in shape.parameter_shapes().values()),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        max_length=shape.max_length,
        fingerprint=fingerprint(folder),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _why_device(device: torch.device) -> str:
    if device.type == "cuda":
        return "the current CUDA device"
    if device.type == "mps":
        return "no CUDA device, but Apple's"
    return "neither CUDA nor MPS is there"


def _has_fast_bfloat16(device: torch.device) -> bool | None:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return None


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").partition("\n")[0].rstrip(".").replace("`", "")


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", repr(function))
