"""Time the device alone: products of large matrices, and forward passes whose token ids are already there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import Setup
from benchmarks.peers.ours import require_dtype
from bge_rerank_integrations.config import DType, ScorerConfig
from bge_rerank_integrations.engine.build import Model, ModelSpec, build_model
from bge_rerank_integrations.engine.cuda.float8 import scaled_product
from bge_rerank_integrations.engine.cuda.fused_ops import PLAIN_OPS
from bge_rerank_integrations.engine.current_device import on_device
from bge_rerank_integrations.engine.device import resolve_device, resolve_dtype, resolve_max_batch_tokens
from bge_rerank_integrations.engine.packing import PackedBatch, pack

IdArray = npt.NDArray[np.int32]

NUM_PRODUCTS: Final = 20
NUM_KERNELS: Final = 15
# Kernels are profiled in a few passes, so that the first one's extra work does not count much.
_NUM_PROFILED: Final = 3


def measure_ceiling(device: str, dtype: str, size: int) -> float | None:
    """Return the TFLOP/s of a large matrix product in torch, as the median of several runs.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: Name of the precision.
        size: Number of rows and columns of both matrices.

    Returns:
        The speed; None for int8, for which torch has no product of the same kind.
    """
    if dtype == "int8":
        return None
    multiply = _product(torch.device(device), dtype, size)
    seconds = []
    for _ in range(NUM_PRODUCTS + 3):
        synchronize(device)
        began = time.perf_counter()
        multiply()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def _product(device: torch.device, dtype: str, size: int) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == "float8":
        rows, weight = PLAIN_OPS.quantize(a), PLAIN_OPS.quantize(b)
        return lambda: scaled_product(rows, weight)
    a, b = (matrix.to(getattr(torch, dtype)) for matrix in (a, b))
    return lambda: a @ b


class DeviceModel(NamedTuple):
    """A model without everything that surrounds its forward pass.

    Attributes:
        model: The forward pass and its CUDA graphs.
        device: The device that it runs on.
        padding_idx: Id of the padding token.
        max_batch_tokens: Most tokens in one batch.
    """

    model: Model
    device: torch.device
    padding_idx: int
    max_batch_tokens: int

    @property
    def num_graphs(self) -> int:
        """Number of captured CUDA graphs."""
        return 0 if self.model.graphs is None else self.model.graphs.num_captured


def load_model(
    setup: Setup,
    dtype: str,
    *,
    capture_graphs: bool = True,
    num_threads: int | None = None,
) -> DeviceModel:
    """Load this package's model without a tokenizer and a queue.

    Raises:
        NotAvailableError: The device does not support the precision, or only emulates it.
    """
    require_dtype(dtype, setup)
    config = ScorerConfig(
        model=setup.model,
        device=setup.device,
        dtype=cast(DType, dtype),
        capture_graphs=capture_graphs,
        num_threads=num_threads,
    )
    device, shape = resolve_device(config), setup.shape()
    budget = resolve_max_batch_tokens(config, device)
    spec = ModelSpec(Path(setup.plain), shape, config, device, resolve_dtype(config, device), budget)
    return DeviceModel(build_model(spec), device, shape.padding_idx, budget)


class Prepared(NamedTuple):
    """Batches whose ids are on the device.

    Attributes:
        batches: The batches, and for each whether a CUDA graph replays it.
        run: Runs a batch.
    """

    batches: list[tuple[PackedBatch, bool]]
    run: Callable[[PackedBatch], object]

    @property
    def num_replayed(self) -> int:
        """Number of batches that a CUDA graph replays."""
        return sum(is_replayed for _, is_replayed in self.batches)


def prepare(loaded: DeviceModel, ids: Sequence[bytes]) -> Prepared:
    """Put sequences into batches, longest first, and copy them to the device.

    Args:
        loaded: The model.
        ids: Token ids of each pair, int32 as bytes.
    """
    sequences = sorted((np.frombuffer(each, np.int32) for each in ids), key=len, reverse=True)
    batches: list[list[IdArray]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room:
            batches.append([])
            room = loaded.max_batch_tokens
        batches[-1].append(sequence)
        room -= len(sequence)
    model = loaded.model
    packed = []
    for batch in batches:
        padded = batch if model.graphs is None else model.graphs.pad(batch)
        on_its_device = pack(
            padded, padding_idx=loaded.padding_idx, device=loaded.device, row_multiple=model.row_multiple
        )
        packed.append((on_its_device, padded is not batch))
    return Prepared(packed, model.forward if model.graphs is None else model.graphs)


def device_seconds(loaded: DeviceModel, ids: Sequence[bytes], repeats: int) -> float:
    """Return the seconds from ids on the device to logits on the device, as the median of several runs."""
    prepared = prepare(loaded, ids)
    seconds = []
    with on_device(loaded.device):
        for _ in range(repeats + 1):
            synchronize(loaded.device)
            began = time.perf_counter()
            for batch, _ in prepared.batches:
                prepared.run(batch)
            synchronize(loaded.device)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def profile_kernels(loaded: DeviceModel, ids: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return the kernels, or the operators of a CPU, that take most of the time of the forward passes.

    Args:
        loaded: The model.
        ids: Token ids of each pair, int32 as bytes.

    Returns:
        The name, the number of calls, the microseconds and the share of all time of each kernel.
    """
    prepared = prepare(loaded, ids)
    on_gpu = loaded.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with on_device(loaded.device):
        prepared.run(prepared.batches[0][0])
        synchronize(loaded.device)
        with profile(activities=activities) as profiled:
            for _ in range(_NUM_PROFILED):
                for batch, _ in prepared.batches:
                    prepared.run(batch)
            synchronize(loaded.device)
    # An operator has the same device time as the kernels that it launched, so only kernels count on a GPU.
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    measured = "CUDA" if on_gpu else "CPU"
    rows = sorted(
        (
            (getattr(event, attribute), event)
            for event in profiled.key_averages()
            if event.device_type.name == measured
        ),
        key=lambda row: -row[0],
    )
    total = sum(microseconds for microseconds, _ in rows) or 1.0
    return [
        {
            "name": event.key,
            "calls": event.count // _NUM_PROFILED,
            "microseconds": microseconds / _NUM_PROFILED,
            "share": microseconds / total,
        }
        for microseconds, event in rows[:NUM_KERNELS]
    ]


def synchronize(device: str | torch.device) -> None:
    """Wait until a device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
