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
from bge_rerank_integrations.engine.model import EncoderShape
from bge_rerank_integrations.errors import (
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

# Tensors that older or multi-purpose checkpoints carry and this architecture does not read.
_UNUSED: Final = frozenset(
    {
        "roberta.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
        "roberta.pooler.dense.weight",
        "roberta.pooler.dense.bias",
    }
)
_FLOATING: Final = ("F64", "F32", "F16", "BF16")
# A matrix may be stored as int8, with what each row is to be multiplied by beside it.
_QUANTIZED: Final = "I8"
_SCALE: Final = "_scale"
# Of a tensor that is being copied: 64 MB in float32.
_MAX_MAPPED_VALUES: Final = 1 << 24


def load_weights(
    folder: Path, shape: EncoderShape, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Verify every tensor's name, shape and type, then load them; the classifier stays in float32.

    For int8, which is made of them later, matrices are loaded in float32, and word embeddings, which are only
    looked up, in float16.

    A matrix stored as int8 `NAME` beside float `NAME_scale` of shape [rows, 1], which is how weights
    quantized by row are published, is multiplied out.

    Raises:
        CheckpointNotFoundError: There are no weights, or a shard is missing.
        CorruptCheckpointError: A file is damaged, a tensor is missing, superfluous or of the wrong
            shape, or a value is not finite in `dtype`.
        UnsupportedCheckpointError: The weights are pickled, quantized in another way than by row to
            int8, or without a relevance head.
    """
    homes = _find_tensors(folder, shape)
    weights: dict[str, Tensor] = {}
    for name, dimensions in shape.parameter_shapes().items():
        target = _loaded_dtype(name, dtype)
        tensor = torch.empty(dimensions, dtype=target, device=device)
        for start in range(0, dimensions[0], _rows_at_once(dimensions)):
            rows = slice(start, start + _rows_at_once(dimensions))
            tensor[rows] = _read(homes, name, rows)
        if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise CorruptCheckpointError(
                f"{folder}: tensor {name} holds NaN or infinity in {target}; fetch the checkpoint "
                "again, or use dtype 'float32' if it was made in a wider type"
            )
        weights[name] = tensor
    return weights


class _Home(NamedTuple):
    """The file that a tensor is in, and its name there."""

    path: Path
    name: str


def _find_tensors(folder: Path, shape: EncoderShape) -> dict[str, _Home]:
    """Return where each tensor of a model is, once the headers of all files are verified."""
    from safetensors import SafetensorError, safe_open

    homes: dict[str, _Home] = {}
    headers: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in weight_files(folder):
            refuse_lfs_pointer(path)
            try:
                shard = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise CorruptCheckpointError(
                    f"{path} is damaged or was not downloaded to its end ({error}); fetch it again"
                ) from error
            for stored_name in shard.keys():  # noqa: SIM118  # it is no dict
                name = _current_name(stored_name)
                homes[name] = _Home(path, stored_name)
                headers[name] = shard.get_slice(stored_name)
        _verify_headers(folder, headers, shape)
    return homes


def _current_name(stored_name: str) -> str:
    """Return what a tensor is called today: BERT's norms had other names, which some releases still write."""
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
    """Read some rows; the file is closed again, since what is mapped of it counts as memory until then."""
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
    expected = shape.parameter_shapes()
    missing = sorted(set(expected) - set(headers))
    if any(name.startswith("classifier.") for name in missing):
        raise UnsupportedCheckpointError(
            f"{folder} has no relevance head ({', '.join(n for n in missing if 'classifier' in n)}): it "
            "looks like an embedding or a pretrained model, which cannot rerank; use a reranker such as "
            "BAAI/bge-reranker-base"
        )
    if missing:
        raise CorruptCheckpointError(
            f"{folder}: {len(missing)} tensor(s) that config.json calls for are missing, the first is "
            f"{missing[0]}; fetch the checkpoint again"
        )
    for name, dimensions in shape.parameter_shapes().items():
        quantized = len(dimensions) == 2 and headers[name].get_dtype() == _QUANTIZED
        if quantized and name + _SCALE in headers:
            expected[name + _SCALE] = (dimensions[0], 1)
    extra = sorted(set(headers) - set(expected) - _UNUSED)
    if extra:
        raise CorruptCheckpointError(
            f"{folder}: {len(extra)} tensor(s) do not belong to the model that config.json describes, "
            f"the first is {extra[0]}; config and weights must be of one checkpoint"
        )
    for name, dimensions in expected.items():
        header = headers[name]
        if tuple(header.get_shape()) != dimensions:
            raise CorruptCheckpointError(
                f"{folder}: tensor {name} has shape {tuple(header.get_shape())}, but config.json calls "
                f"for {dimensions}; config and weights must be of one checkpoint"
            )
        if header.get_dtype() not in _FLOATING and name + _SCALE not in expected:
            raise UnsupportedCheckpointError(
                f"{folder}: tensor {name} is stored as {header.get_dtype()}; only plain weights "
                f"({', '.join(_FLOATING)}) and matrices of int8 with a scale for each row can be loaded"
            )
