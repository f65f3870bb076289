"""OpenVINO, over a graph converted from torch, in bfloat16 and in int8 by nncf."""

from __future__ import annotations

import gc
import io
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, IdBatch, NotAvailableError
from benchmarks.peers.graph import calibration, graph_contender, num_cores, traceable


def load(dtype: str, setup: Setup, _: ExitStack) -> Contender:
    """Convert the model where that was not done, and load it."""
    import openvino

    if setup.on_cuda:
        raise NotAvailableError("it runs on CPUs")
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and "BF16" not in capabilities:
        raise NotAvailableError("this CPU has no arithmetic for bfloat16")
    options = {"INFERENCE_NUM_THREADS": num_cores(), "PERFORMANCE_HINT": "LATENCY"}
    if "BF16" in capabilities:  # what is not in int8 is fastest so
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    model = core.compile_model(str(prepare(dtype, setup)), "CPU", options)

    def infer(ids: IdBatch, mask: IdBatch) -> Any:
        return model([ids, mask])[0]

    return graph_contender("OpenVINO", dtype, setup, infer)


def prepare(dtype: str, setup: Setup) -> Path:
    """Write the graph where it is not there yet, and return it."""
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
    with redirect_stdout(io.StringIO()):  # its progress bars
        quantized = nncf.quantize(
            openvino.Core().read_model(plain),
            nncf.Dataset(data),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(data),
        )
    openvino.save_model(quantized, path)
    gc.collect()
