"""Verifies the tensors of a checkpoint and loads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bge_rerank_integrations.engine.checkpoint.files import refuse_lfs_pointer, weight_files
from bge_rerank_integrations.engine.shape import EncoderShape
from bge_rerank_integrations.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

# Tensors in older or multi-purpose checkpoints that this architecture does not use.
_UNUSED: Final = frozenset(
    {
        "roberta.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
        "roberta.pooler.dense.weight",
        "roberta.pooler.dense.bias",
    }
)
_FLOATING: Final = ("F64", "F32", "F16", "BF16")
# A matrix NAME may be stored as int8, with the scale of each row in a tensor NAME_scale.
_QUANTIZED: Final = "I8"
_SCALE: Final = "_scale"
# Most values of a tensor to map into memory at once: 64 MB in float32.
_MAX_MAPPED_VALUES: Final = 1 << 24


def load_weights(
    folder: Path, shape: EncoderShape, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Verify the name, shape and type of every tensor, then load the tensors.

    The classifier is loaded in float32. For int8, the model quantizes the matrices later, so they are loaded
    in float32. The word embeddings of an int8 model are not quantized, and are loaded in float16.

    A file may store a matrix as an int8 tensor `NAME` and a float tensor `NAME_scale` of shape [rows, 1].
    Their product is loaded.

    Args:
        folder: The folder of the checkpoint.
        shape: The shape of the checkpoint.
        device: The device to load the tensors onto.
        dtype: Precision of the encoder.

    Returns:
        Every tensor of `shape.parameter_shapes()`, by name.

    Raises:
        CheckpointNotFoundError: There are no weights, or a shard is missing.
        CorruptCheckpointError: A file is damaged, a tensor is missing, unexpected or of the wrong shape, or a
            value is not finite in `dtype`.
        UnsupportedCheckpointError: The weights are pickled, are quantized in another way than by row to int8,
            or have no relevance head.
    """
    homes = verify_weights(folder, shape)
    weights: dict[str, Tensor] = {}
    for name, dimensions in shape.parameter_shapes().items():
        target = _loaded_dtype(name, dtype)
        tensor = torch.empty(dimensions, dtype=target, device=device)
        for start in range(0, dimensions[0], _rows_at_once(dimensions)):
            rows = slice(start, start + _rows_at_once(dimensions))
            tensor[rows] = _read(homes, name, rows)
        if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise CorruptCheckpointError(
                f"{folder}: tensor {name} contains NaN or infinity in {target}; download the checkpoint "
                "again, or use dtype 'float32' if its weights need a wider type"
            )
        weights[name] = tensor
    return weights


class _Home(NamedTuple):
    """The file that contains a tensor, and the name of the tensor in that file."""

    path: Path
    name: str


def verify_weights(folder: Path, shape: EncoderShape) -> dict[str, _Home]:
    """Verify the name, shape and type of every tensor without loading it.

    Returns:
        The file of each tensor.

    Raises:
        CheckpointError: For the same reasons as `load_weights`.
    """
    from safetensors import SafetensorError, safe_open

    homes: dict[str, _Home] = {}
    headers: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in weight_files(folder):
            refuse_lfs_pointer(path)
            try:
                shard = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                if not _is_utf8(path):
                    raise CheckpointError(f"the path {str(path)!r} is not UTF-8; rename the folder") from None
                raise CorruptCheckpointError(
                    f"{path} is damaged or was not downloaded completely ({error}); download it again"
                ) from error
            for stored_name in shard.keys():  # noqa: SIM118  # `shard` is not a dict
                name = _current_name(stored_name)
                homes[name] = _Home(path, stored_name)
                headers[name] = shard.get_slice(stored_name)
        _verify_headers(folder, headers, shape)
    return homes


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _current_name(stored_name: str) -> str:
    """Return the current name of a tensor. Some releases of transformers write older names of norms."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if stored_name.endswith(old):
            return stored_name.removesuffix(old) + new
    return stored_name


def _loaded_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if name.startswith("classifier."):
        return torch.float32
    if dtype is torch.int8:
        return torch.float16 if name.endswith("word_embeddings.weight") else torch.float32
    return dtype


def _rows_at_once(dimensions: tuple[int, ...]) -> int:
    return max(_MAX_MAPPED_VALUES // math.prod(dimensions[1:]), 1)


def _read(homes: Mapping[str, _Home], name: str, rows: slice) -> Tensor:
    """Read some rows of a tensor. Each call opens and closes the file, which releases the mapped memory."""
    from safetensors import safe_open

    with safe_open(homes[name].path, framework="pt", device="cpu") as shard:
        part: Tensor = shard.get_slice(homes[name].name)[rows]
        if part.dtype is not torch.int8:
            return part
    scale_home = homes[name + _SCALE]
    with safe_open(scale_home.path, framework="pt", device="cpu") as shard:
        scale: Tensor = shard.get_slice(scale_home.name)[rows]
    return part.float() * scale.float()


def _verify_headers(folder: Path, headers: dict[str, Any], shape: EncoderShape) -> None:
    if shape.num_layers > len(headers):
        raise CorruptCheckpointError(
            f"{folder}: config.json requires {shape.num_layers} layers, but the weights have only "
            f"{len(headers)} tensors; config and weights must come from the same checkpoint"
        )
    expected = shape.parameter_shapes()
    missing = sorted(set(expected) - set(headers))
    if any(name.startswith("classifier.") for name in missing):
        raise UnsupportedCheckpointError(
            f"{folder} has no relevance head ({', '.join(n for n in missing if 'classifier' in n)}): it "
            "looks like an embedding model or a pretrained model, which cannot rerank; use a reranker such "
            "as BAAI/bge-reranker-base"
        )
    if missing:
        raise CorruptCheckpointError(
            f"{folder}: {len(missing)} tensor(s) that config.json requires are missing, the first is "
            f"{missing[0]}; download the checkpoint again"
        )
    for name, dimensions in shape.parameter_shapes().items():
        quantized = len(dimensions) == 2 and headers[name].get_dtype() == _QUANTIZED
        if quantized and name + _SCALE in headers:
            expected[name + _SCALE] = (dimensions[0], 1)
    extra = sorted(set(headers) - set(expected) - _UNUSED)
    if extra:
        raise CorruptCheckpointError(
            f"{folder}: {len(extra)} tensor(s) do not belong to the model that config.json describes, "
            f"the first is {extra[0]}; config and weights must come from the same checkpoint"
        )
    for name, dimensions in expected.items():
        header = headers[name]
        if tuple(header.get_shape()) != dimensions:
            raise CorruptCheckpointError(
                f"{folder}: tensor {name} has shape {tuple(header.get_shape())}, but config.json requires "
                f"{dimensions}; config and weights must come from the same checkpoint"
            )
        if header.get_dtype() not in _FLOATING and name + _SCALE not in expected:
            raise UnsupportedCheckpointError(
                f"{folder}: tensor {name} is stored as {header.get_dtype()}; only floating-point weights "
                f"({', '.join(_FLOATING)}) and int8 matrices with a scale for each row can be loaded"
            )
