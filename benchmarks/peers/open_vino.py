"""OpenVINO with a graph converted from torch, in float32, in bfloat16 and in int8 by nncf."""

from __future__ import annotations

import gc
import io
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, IdBatch, NotAvailableError
from benchmarks.peers.graph import calibration, graph_contender, num_cores, traceable

_NUM_TRIED: Final = 8


def load(dtype: str, setup: Setup, _: ExitStack) -> Contender:
    """Convert the model if that has not been done yet, and load it."""
    import openvino

    if setup.on_cuda:
        raise NotAvailableError("it runs only on CPUs here")
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and "BF16" not in capabilities:
        raise NotAvailableError("this CPU has no bfloat16 arithmetic")
    path = str(prepare(dtype, setup))
    precision = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}[dtype]
    if dtype == "int8" and "BF16" in capabilities:
        # An int8 model computes everything except its int8 products in this precision. Which one is faster
        # depends on the processor, so both are timed.
        precision = min("bf16", "f32", key=lambda each: _seconds(_compile(core, path, each), setup))
    model = _compile(core, path, precision)

    def infer(ids: IdBatch, mask: IdBatch) -> Any:
        return model([ids, mask])[0]

    name = f"OpenVINO (rest {precision})" if dtype == "int8" else "OpenVINO"
    return graph_contender(name, dtype, setup, infer)


def _compile(core: Any, path: str, precision: str) -> Any:
    options = {
        "INFERENCE_NUM_THREADS": num_cores(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    return core.compile_model(path, "CPU", options)


def _seconds(model: Any, setup: Setup) -> float:
    batches = [list(batch.values()) for batch in calibration(setup)[:_NUM_TRIED]]
    took = []
    for _ in range(3):  # the first run compiles a kernel for each length
        began = time.perf_counter()
        for batch in batches:
            model(batch)
        took.append(time.perf_counter() - began)
    return min(took)


def prepare(dtype: str, setup: Setup) -> Path:
    """Write the graph if it does not exist yet, and return its path."""
    plain, quantized = (setup.exports / f"openvino-{name}.xml" for name in ("float32", "int8"))
    if not plain.exists():
        _convert(setup.plain, plain)
    if dtype == "int8" and not quantized.exists():
        _quantize(setup, plain, quantized)
    return quantized if dtype == "int8" else plain


def _convert(folder: Path, path: Path) -> None:
    import openvino

    module, example = traceable(folder, "sdpa")
    with torch.no_grad():
        graph = openvino.convert_model(module, example_input=example)
    openvino.save_model(graph, path, compress_to_fp16=False)
    del graph, module
    gc.collect()


def _quantize(setup: Setup, plain: Path, path: Path) -> None:
    import nncf
    import openvino

    data = calibration(setup)
    with redirect_stdout(io.StringIO()):  # hides its progress bars
        quantized = nncf.quantize(
            openvino.Core().read_model(plain),
            nncf.Dataset(data),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(data),
        )
    openvino.save_model(quantized, path)
    gc.collect()
