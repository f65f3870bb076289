"""Resolves the device, precision, token budget and thread count of a config on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import torch

from bge_rerank_integrations.config import FLOAT8_NEEDS, FLOAT16_ON_CPU, INT8_OFF_CPU, ScorerConfig
from bge_rerank_integrations.engine.attention import resolve_attention
from bge_rerank_integrations.engine.cpu.amx import has_amx
from bge_rerank_integrations.engine.cpu.cores import UsableCores, usable_cores
from bge_rerank_integrations.engine.cuda.support import kernel_obstacle
from bge_rerank_integrations.errors import ConfigError, DeviceError
from bge_rerank_integrations.runtime.warn_once import warn_once

logger = logging.getLogger(__name__)

# The width of a head in all BGE rerankers. The choice of the attention implementation depends on it.
BGE_HEAD_DIM: Final = 64

# On a CPU, small batches stay in the cache. A GPU needs enough rows to keep all of it busy. On CUDA, two
# batches of this size run at once.
_MAX_BATCH_TOKENS: Final = {"cpu": 2048, "mps": 8192, "cuda": 16384}
# Each CPU thread computes its own sequences, and needs several of them for an even split.
_MIN_THREAD_TOKENS: Final = 512
# Ada and later: both Ada and Hopper have float8 arithmetic, and torch has kernels for both.
_FLOAT8_CAPABILITY: Final = (8, 9)


class PrecisionChoice(NamedTuple):
    """The precision that a config selects on a device.

    Attributes:
        dtype: Precision of the encoder's products.
        reason: Why this precision is used.
    """

    dtype: torch.dtype
    reason: str


class ThreadChoice(NamedTuple):
    """The number of CPU threads that compute.

    Attributes:
        num_threads: Number of threads, at least 1.
        reason: Why this number is used.
    """

    num_threads: int
    reason: str


def resolve_device(config: ScorerConfig) -> torch.device:
    """Return the device that a config selects.

    Raises:
        DeviceError: This machine does not have that device, or the installed torch cannot use it.
    """
    if config.device == "auto":
        return choose_device().device
    device = torch.device(config.device)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = 0 if device.index is None else device.index
        if index >= count:
            raise DeviceError(
                f"device {config.device!r} is not available: torch {torch.__version__} sees {count} CUDA "
                "device(s); use device='auto', or install a CUDA build of torch"
            )
        device = torch.device("cuda", index)
        obstacle = kernel_obstacle(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device 'mps' is not available on this machine; use device='auto'")
        obstacle = _mps_obstacle()
    else:
        return torch.device(device.type)
    if obstacle is not None:
        raise DeviceError(f"device {config.device!r} cannot be used: {obstacle}")
    return device


class DeviceChoice(NamedTuple):
    """The device that `auto` selects, and why."""

    device: torch.device
    reason: str


def choose_device() -> DeviceChoice:
    """Return the first of CUDA, MPS and CPU that works. Log a warning about a device that does not work."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        obstacle, reason = kernel_obstacle(device), "the current CUDA device"
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
        obstacle, reason = _mps_obstacle(), "no CUDA device is available, but MPS is"
    else:
        return DeviceChoice(torch.device("cpu"), "neither CUDA nor MPS is available")
    if obstacle is None:
        return DeviceChoice(device, reason)
    warn_once(logger, "device 'auto' selects the CPU instead of %s: %s", device, obstacle)
    return DeviceChoice(torch.device("cpu"), f"{device} cannot be used: {obstacle}")


@cache
def _mps_obstacle() -> str | None:
    """Return why the scores of an MPS device would be wrong; None if attention is right there."""
    try:
        resolve_attention(torch.device("mps"), torch.float32, BGE_HEAD_DIM)
    except DeviceError as error:
        return str(error)
    return None


def resolve_precision(
    config: ScorerConfig, device: torch.device, *, has_amx: Callable[[], bool] = has_amx
) -> PrecisionChoice:
    """Return the precision of the encoder's products on a device, and why it is used.

    Args:
        config: The settings.
        device: The device that the model runs on.
        has_amx: Returns whether a CPU multiplies bfloat16 matrices with AMX. It is called only if the answer
            matters.

    Raises:
        ConfigError: The precision is float16 on a CPU, float8 on a device other than CUDA, or int8 on a
            device other than a CPU.
        DeviceError: The precision is float8 and the CUDA device does not support it.
    """
    if config.dtype == "auto":
        return _default_precision(device, has_amx)
    if config.dtype == "float16" and device.type == "cpu":
        raise ConfigError(FLOAT16_ON_CPU)
    if config.dtype == "int8" and device.type != "cpu":
        raise ConfigError(INT8_OFF_CPU)
    if config.dtype == "float8":
        _check_float8(device)
        return PrecisionChoice(torch.float8_e4m3fn, "chosen")
    return PrecisionChoice(getattr(torch, config.dtype), "chosen")


def resolve_dtype(config: ScorerConfig, device: torch.device) -> torch.dtype:
    """Return the precision of the encoder's products on a device. It raises what `resolve_precision` does."""
    return resolve_precision(config, device).dtype


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the activations between the matrix products of the given precision."""
    return torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype


def resolve_max_batch_tokens(config: ScorerConfig, device: torch.device) -> int:
    """Return the token budget of one forward pass."""
    if config.max_batch_tokens is not None:
        return config.max_batch_tokens
    least = _MIN_THREAD_TOKENS * resolve_num_threads(config) if device.type == "cpu" else 0
    return max(_MAX_BATCH_TOKENS[device.type], least)


def resolve_num_threads(config: ScorerConfig) -> int:
    """Return the number of CPU threads that compute."""
    return resolve_threads(config).num_threads


def resolve_threads(config: ScorerConfig) -> ThreadChoice:
    """Return the number of CPU threads that compute, and why this number is used."""
    if config.num_threads is not None:
        return ThreadChoice(config.num_threads, "chosen")
    return default_threads(torch.get_num_threads(), usable_cores())


def default_threads(torch_threads: int, cores: UsableCores) -> ThreadChoice:
    """Return the number of threads for a config that does not set it.

    Args:
        torch_threads: Number of threads that torch would use.
        cores: The cores that the process may use.
    """
    if cores.num_cores < torch_threads and cores.limited_by is not None:
        return ThreadChoice(cores.num_cores, cores.limited_by)
    return ThreadChoice(torch_threads, "torch's choice")


def _default_precision(device: torch.device, has_amx: Callable[[], bool]) -> PrecisionChoice:
    if device.type == "cuda":
        return PrecisionChoice(torch.float16, "default on cuda")
    if device.type == "cpu" and has_amx():
        return PrecisionChoice(torch.bfloat16, "default on a CPU with AMX")
    return PrecisionChoice(
        torch.float32, "default on a CPU without AMX" if device.type == "cpu" else "default on mps"
    )


def _check_float8(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"{FLOAT8_NEEDS}; device is {device.type!r}")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < _FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise DeviceError(
            f"{FLOAT8_NEEDS}; {device} is {name!r} of capability {'.'.join(map(str, capability))}"
        )
