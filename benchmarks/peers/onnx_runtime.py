"""ONNX Runtime with a graph exported by torch, in float32 and in dynamic int8."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, IdBatch, NotAvailableError
from benchmarks.peers.graph import INPUTS, graph_contender, num_cores, traceable

_OPSET = 17
# A protobuf file is limited to 2 GB. Larger models store their weights in separate files.
_LARGE_BYTES = 3 << 29


def load(dtype: str, setup: Setup, _: ExitStack) -> Contender:
    """Export the model if that has not been done yet, and load it."""
    import onnxruntime

    if setup.on_cuda and (dtype == "int8" or "CUDAExecutionProvider" not in _providers(onnxruntime)):
        raise NotAvailableError("on CUDA it supports only float32, and needs onnxruntime-gpu")
    provider = "CUDAExecutionProvider" if setup.on_cuda else "CPUExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_cores()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(prepare(dtype, setup)), options, providers=[provider])

    def infer(ids: IdBatch, mask: IdBatch) -> Any:
        return session.run(None, dict(zip(INPUTS, (ids, mask), strict=True)))[0]

    return graph_contender("ONNX Runtime", dtype, setup, infer)


def prepare(dtype: str, setup: Setup) -> Path:
    """Write the graph if it does not exist yet, and return its path."""
    plain, quantized = (setup.exports / name / "model.onnx" for name in ("onnx-float32", "onnx-int8"))
    if not plain.exists():
        _export(setup.plain, plain)
    if dtype == "int8" and not quantized.exists():
        _quantize(plain, quantized)
    return quantized if dtype == "int8" else plain


def _export(folder: Path, path: Path) -> None:
    import onnx  # noqa: F401  # torch writes the file with this package

    path.parent.mkdir()
    # ONNX Runtime can fuse eager attention.
    module, example = traceable(folder, "eager")
    with torch.no_grad():
        torch.onnx.export(
            module,
            tuple(example.values()),
            str(path),
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_axes={**{name: {0: "pairs", 1: "tokens"} for name in INPUTS}, "logits": {0: "pairs"}},
            opset_version=_OPSET,
            dynamo=False,
        )
    del module
    gc.collect()


def _quantize(plain: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path.parent.mkdir()
    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_dynamic(
            plain,
            path,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            use_external_data_format=_num_bytes(plain.parent) > _LARGE_BYTES,
        )
    finally:
        logging.getLogger().removeFilter(_no_advice)


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()


def _providers(onnxruntime: Any) -> list[str]:
    return list(onnxruntime.get_available_providers())
