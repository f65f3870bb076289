"""Find, verify and load a checkpoint; refuse whatever would score wrongly, before anything is scored."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bge_rerank_integrations.config import EMBEDDED_MODEL, LOCAL_REVISION, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.mistaken_folders import (
    ADAPTER_CONFIG,
    describe_other_model,
    download_command,
    refuse_dangling_link,
    refuse_mistaken_folder,
)
from bge_rerank_integrations.engine.model import EncoderShape
from bge_rerank_integrations.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    HubUnreachableError,
    UnsupportedCheckpointError,
)

ARCHITECTURE: Final = "XLMRobertaForSequenceClassification"
EMBEDDED_FOLDER: Final = Path(__file__).parents[1] / "embedded"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
# Where sentence-transformers says how a model's inputs are made.
INPUT_FILES: Final = ("modules.json", "config_sentence_transformers.json", "sentence_*config.json")

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
# What config.json says in whole numbers.
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# Of a tensor that is being copied: 64 MB in float32.
_MAX_MAPPED_VALUES: Final = 1 << 24
_LFS_POINTER: Final = b"version https://git-lfs"
_TO_SAFETENSORS: Final = (
    "Convert it once with: AutoModelForSequenceClassification.from_pretrained(MODEL)"
    ".save_pretrained(FOLDER), from transformers, on a machine where you trust the file"
)


def find_checkpoint(config: ScorerConfig) -> Path:
    """Return the local folder of a checkpoint, downloading it from the hub where needed.

    `embedded` is the one that comes with this package, also where the working directory has a folder of
    that name (which is `./embedded`).

    Raises:
        ConfigError: A revision is asked for of a local folder.
        CheckpointNotFoundError: The folder, repository or revision does not exist or may not be read.
        HubUnreachableError: The hub does not answer and the cache does not have the model.
    """
    if config.model == EMBEDDED_MODEL:
        return EMBEDDED_FOLDER
    try:
        path = Path(config.model).expanduser()
    except RuntimeError as error:  # ~somebody
        raise CheckpointNotFoundError(f"model folder {config.model!r} does not exist") from error
    if path.is_dir():
        if config.revision is not None:
            raise ConfigError(LOCAL_REVISION.format(model=config.model))
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"model {config.model!r} is a file; name the folder it lies in")
    if path.is_absolute() or config.model[0] in ".~" or (os.sep == "\\" and "\\" in config.model):
        raise CheckpointNotFoundError(f"model folder {config.model!r} does not exist")
    return _download(config)


def read_shape(folder: Path) -> EncoderShape:
    """Read config.json.

    Raises:
        CheckpointNotFoundError: There is none.
        CorruptCheckpointError: It cannot be parsed.
        UnsupportedCheckpointError: It describes something other than a one-label XLM-RoBERTa
            cross-encoder, or asks for remote code.
    """
    data = read_json(require_file(folder, "config.json"))
    if "auto_map" in data:
        raise UnsupportedCheckpointError(
            f"{folder} asks for code of its own to be run (auto_map), which this package never does; "
            f"use a plain {ARCHITECTURE} checkpoint"
        )
    architectures = data.get("architectures") or [ARCHITECTURE]
    if data.get("model_type") != "xlm-roberta" or ARCHITECTURE not in architectures:
        raise UnsupportedCheckpointError(
            f"{folder} {describe_other_model(data.get('model_type'), data.get('architectures'))}"
        )
    from transformers import XLMRobertaConfig

    try:
        config = XLMRobertaConfig.from_dict(data)
    except Exception as error:  # its validation raises several unrelated types
        raise CorruptCheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error
    padding_idx = 1 if config.pad_token_id is None else config.pad_token_id
    # Not every release of transformers checks the types.
    for name, value, least in (
        *((name, getattr(config, name), 1) for name in _SIZES),
        ("pad_token_id", padding_idx, 0),
    ):
        if type(value) is not int or value < least:
            raise CorruptCheckpointError(
                f"{folder / 'config.json'} is not valid: {name} must be a whole number of at least {least}"
            )
    if type(config.layer_norm_eps) is not float or not 0 < config.layer_norm_eps < 1:
        raise CorruptCheckpointError(
            f"{folder / 'config.json'} is not valid: layer_norm_eps must be a number between 0 and 1"
        )
    for name, value, supported in (
        ("num_labels", config.num_labels, 1),
        ("hidden_act", config.hidden_act, "gelu"),
        ("position_embedding_type", data.get("position_embedding_type", "absolute"), "absolute"),
        ("is_decoder", bool(data.get("is_decoder", False)), False),
        ("hidden_size % num_attention_heads", config.hidden_size % config.num_attention_heads, 0),
    ):
        if value != supported:
            raise UnsupportedCheckpointError(
                f"{folder} has {name} = {value!r}; a cross-encoder that gives one relevance score has "
                f"{supported!r}"
            )
    return EncoderShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        padding_idx=padding_idx,
        layer_norm_eps=config.layer_norm_eps,
    )


def check_max_length(config: ScorerConfig, shape: EncoderShape) -> None:
    """Raise `ConfigError` if a config wants longer pairs than a model has positions for."""
    if config.max_length > shape.max_length:
        raise ConfigError(
            f"max_length {config.max_length} is more than the {shape.max_length} tokens that "
            f"{config.model!r} has positions for"
        )


def fingerprint(folder: Path) -> str:
    """Return what tells a checkpoint from another without reading all of it.

    The digest is of its config, its tokenizer and how its inputs are made, and of the sizes, beginnings and
    ends of its weights.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update(require_file(folder, name).read_bytes())
    for path in sorted(path for pattern in INPUT_FILES for path in folder.glob(pattern)):
        digest.update(path.read_bytes())
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
    return digest.hexdigest()


def identity(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a checkpoint's model does: path, size and time of each of its files."""
    paths = [path.resolve() for path in (require_file(folder, "config.json"), *_weight_files(folder))]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def verify_sha256(folder: Path, sha256: str) -> None:
    """Hash the weight files, in the order of their names.

    Raises:
        CorruptCheckpointError: The hash is another.
    """
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise CorruptCheckpointError(
            f"{folder}: the weights have sha256 {digest.hexdigest()}, not the one asked for; they were "
            "changed, damaged or are of another revision"
        )


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
        for path in _weight_files(folder):
            _refuse_lfs_pointer(path)
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


def require_file(folder: Path, name: str) -> Path:
    """Return a file of the checkpoint.

    Raises:
        CheckpointNotFoundError: It is not there.
        CorruptCheckpointError: It is a Git LFS pointer.
    """
    path = folder / name
    if not path.is_file():
        refuse_dangling_link(path)
        if name == "config.json" or not any((folder / weights).is_file() for weights in (WEIGHTS, INDEX)):
            refuse_mistaken_folder(folder)
        hint = ""
        if name == "tokenizer.json":
            hint = "; write it with AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
        raise CheckpointNotFoundError(f"{folder} holds no {name}{hint}")
    _refuse_lfs_pointer(path)
    return path


def _download(config: ScorerConfig) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    what = f"model {config.model!r}" + (f" at revision {config.revision!r}" if config.revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                config.model,
                revision=config.revision,
                cache_dir=config.cache_folder,
                local_files_only=config.local_files_only,
                allow_patterns=[
                    "config.json",
                    "tokenizer.json",
                    "model*.safetensors",
                    INDEX,
                    ADAPTER_CONFIG,
                    *INPUT_FILES,
                ],
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointNotFoundError(
            f"{what}: neither an existing folder nor a valid hub id ('organisation/name')"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{what} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"{what} is neither an existing local folder nor on the hub; if it is private, log in with "
            "`hf auth login`"
        ) from error
    except OSError as error:  # the hub's own errors for no answer, and the network's
        raise HubUnreachableError(
            f"{what} is not an existing local folder, not in the local cache, and the hub could not be "
            "asked. To work offline, fetch it once on a connected machine "
            f"(`{download_command(config.model)}`), copy that folder here and pass its path as the model; "
            "point cache_folder at a cache that has it, with local_files_only=True; or use "
            f'model="{EMBEDDED_MODEL}", the small English model that comes with this package'
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = read_json(require_file(folder, INDEX)).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CorruptCheckpointError(f"{folder / INDEX} names no weight files; fetch it again")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise CorruptCheckpointError(f"{folder / INDEX} points outside its folder")
        return [require_file(folder, name) for name in sorted(set(names.values()))]
    for path in (folder / WEIGHTS, folder / INDEX):
        refuse_dangling_link(path)
    refuse_mistaken_folder(folder)
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise UnsupportedCheckpointError(
            f"{folder} has pickled weights only, which can run code when they are loaded. {_TO_SAFETENSORS}"
        )
    raise CheckpointNotFoundError(
        f"{folder} holds no {WEIGHTS}. If the model is published as pytorch_model.bin only: {_TO_SAFETENSORS}"
    )


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


def _refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CorruptCheckpointError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CorruptCheckpointError: It holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not valid JSON; fetch it again") from error
    if not isinstance(data, dict):
        raise CorruptCheckpointError(f"{path} is not a JSON object; fetch it again")
    return data
