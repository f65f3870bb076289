"""Reports how this machine would run a model and what a checkpoint contains, without loading the model."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.attention import name_of, resolve_attention
from bge_rerank_integrations.engine.checkpoint.files import fingerprint
from bge_rerank_integrations.engine.checkpoint.locate import find_checkpoint
from bge_rerank_integrations.engine.checkpoint.model_config import check_max_length, read_shape
from bge_rerank_integrations.engine.checkpoint.prompts import read_default_prompt
from bge_rerank_integrations.engine.cpu.amx import has_amx
from bge_rerank_integrations.engine.cpu.int8_support import is_faster_in_int8, require_int8
from bge_rerank_integrations.engine.cuda.float8 import check_float8, scaled_product
from bge_rerank_integrations.engine.cuda.fused_ops import resolve_fused
from bge_rerank_integrations.engine.cuda.graphs import can_capture, plan_buckets
from bge_rerank_integrations.engine.device import (
    BGE_HEAD_DIM,
    activation_dtype,
    choose_device,
    resolve_device,
    resolve_dtype,
    resolve_max_batch_tokens,
    resolve_precision,
    resolve_threads,
)
from bge_rerank_integrations.engine.linear import resolve_linear

# Hidden and intermediate size of the smallest BGE reranker. Kernels are tried on these widths.
_BGE_WIDTHS = (768, 3072)


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """How this machine would run a model with a given config.

    Attributes:
        device: Such as `cpu` or `cuda:0`. Commas separate several devices: `cuda:0, cuda:1`.
        device_name: Product name of the first device. The attributes below describe that device.
        device_reason: Why this device is used.
        dtype: Precision of the encoder, by its name in a config.
        dtype_reason: Why this precision is used.
        attention: Name of the attention implementation.
        attention_reason: What that implementation does.
        linear: Name of the implementation of linear layers.
        linear_reason: What that implementation does.
        between_products: Name of the operators for bias, GELU, residual and norm, which run between matrix
            products. For a fallback it includes the reason.
        max_graph_tokens: Most tokens in a batch that may run as a CUDA graph; 0 without graphs. A device that
            computes such a batch more than twice as long as the host launches it uses fewer.
        threads: Number of CPU threads that compute.
        threads_reason: Why this number is used.
        cores: Number of CPU cores of the machine.
        max_batch_tokens: Most tokens in one forward pass.
        bfloat16: Whether bfloat16 is faster than float32 on the device; None if it depends on the CPU.
        python: Version of Python.
        torch: Version of torch.
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
    between_products: str
    max_graph_tokens: int
    threads: int
    threads_reason: str
    cores: int
    max_batch_tokens: int
    bfloat16: bool | None
    python: str
    torch: str


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """What a checkpoint contains.

    Attributes:
        folder: Path of the checkpoint.
        num_bytes: Total size of its files.
        num_parameters: Number of parameters of the model.
        num_layers: Number of encoder layers.
        hidden_size: Width of the hidden states.
        vocab_size: Number of tokens in the vocabulary.
        max_length: Longest pair that the model accepts, in tokens.
        fingerprint: A digest of parts of the files, which differs between checkpoints.
    """

    folder: str
    num_bytes: int
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """The precision that a config selects on this machine, and a faster one where there is one.

    Attributes:
        device: Such as `cpu`. Commas separate several devices: `cuda:0, cuda:1`.
        dtype: Precision of the encoder, by its name in a config.
        faster: Value of `dtype` that is faster on this device; None if there is none.
        faster_extra: The extra of this package that `faster` needs and that is not installed; None if
            nothing is missing.
    """

    device: str
    dtype: str
    faster: str | None
    faster_extra: str | None


def describe_precision(config: ScorerConfig) -> PrecisionReport:
    """Return the precision that a config selects on this machine, and a faster one where there is one.

    Raises:
        ConfigError: The device does not support the precision.
        DeviceError: The device is not available.
    """
    devices = [resolve_device(each) for each in config.per_device()]
    dtype = resolve_dtype(config, devices[0])
    faster = _faster_dtype(devices[0], dtype)
    return PrecisionReport(
        device=", ".join(map(str, devices)),
        dtype=_name_of(dtype),
        faster=faster,
        faster_extra="int8" if faster == "int8" and find_spec("numba") is None else None,
    )


def describe_machine(config: ScorerConfig) -> MachineReport:
    """Return how this machine would run a model with the given config.

    Raises:
        ConfigError: The device does not support the precision.
        DeviceError: The device is not available.
    """
    devices = [resolve_device(each) for each in config.per_device()]
    device = devices[0]
    dtype, dtype_reason = resolve_precision(config, device)
    threads, threads_reason = resolve_threads(config)
    is_float8 = dtype is torch.float8_e4m3fn
    if is_float8:
        check_float8(device, _BGE_WIDTHS)
    attention, linear = _implementations(device, dtype, threads)
    ops = resolve_fused(device, activation_dtype(dtype), _BGE_WIDTHS, quantizing=is_float8)
    max_batch_tokens = resolve_max_batch_tokens(config, device)
    max_graph_tokens = 0
    if config.capture_graphs and can_capture(device, attention):
        max_graph_tokens = plan_buckets(config.max_length, max_batch_tokens)[-1].num_rows - 1
    chosen = "chosen"
    return MachineReport(
        device=", ".join(map(str, devices)),
        device_name=_device_name(device),
        device_reason=choose_device().reason if config.device == "auto" and not config.devices else chosen,
        dtype=_name_of(dtype),
        dtype_reason=dtype_reason,
        attention=name_of(attention),
        attention_reason=_summary(attention),
        linear=name_of(linear),
        linear_reason=_summary(linear),
        between_products="kernels compiled by numba" if dtype is torch.int8 else ops.name,
        max_graph_tokens=max_graph_tokens,
        threads=threads,
        threads_reason=threads_reason,
        cores=os.cpu_count() or 1,
        max_batch_tokens=max_batch_tokens,
        bfloat16=_has_fast_bfloat16(device),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def describe_checkpoint(config: ScorerConfig) -> CheckpointReport:
    """Return what a checkpoint contains, from its config and file sizes, without a request to the hub.

    Raises:
        CheckpointError: The checkpoint is not on this machine, or it is not a reranker.
        ConfigError: `max_length` is more than the model accepts.
    """
    folder = find_checkpoint(dataclasses.replace(config, local_files_only=True))
    shape = read_shape(folder)
    check_max_length(config, shape)
    read_default_prompt(folder)  # it raises for inputs that this package cannot build
    return CheckpointReport(
        folder=str(folder),
        num_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        num_parameters=sum(math.prod(dimensions) for dimensions in shape.parameter_shapes().values()),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        max_length=shape.max_length,
        fingerprint=fingerprint(folder),
    )


def _name_of(dtype: torch.dtype) -> str:
    """Return the name of a precision in a config."""
    return "float8" if dtype is torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def _faster_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the name of a precision that is faster than `dtype` on a device; None if there is none."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        if is_faster_in_int8():
            return "int8"
        return "bfloat16" if dtype is torch.float32 and has_amx() else None
    return "float16" if device.type == "cuda" and dtype is torch.float32 else None


def _implementations(
    device: torch.device, dtype: torch.dtype, num_threads: int
) -> tuple[Callable[..., object], Callable[..., object]]:
    """Return the implementations of attention and of linear layers."""
    if dtype is torch.int8:
        require_int8(BGE_HEAD_DIM)
        from bge_rerank_integrations.engine.cpu.int8_attention import attend
        from bge_rerank_integrations.engine.cpu.int8_linear import resolve_product

        return attend, resolve_product()
    attention = resolve_attention(device, activation_dtype(dtype), BGE_HEAD_DIM)
    if dtype is torch.float8_e4m3fn:
        return attention, scaled_product
    return attention, resolve_linear(device, dtype, num_threads)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _has_fast_bfloat16(device: torch.device) -> bool | None:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return None
    if has_amx():
        return True
    # Processors with bfloat16 instructions, but without AMX, multiply bfloat16 faster than float32 or slower.
    has_instructions = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return None if has_instructions else False


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").partition("\n")[0].rstrip(".").replace("`", "")
