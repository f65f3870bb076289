"""Finds and verifies the files of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.engine.checkpoint.mistaken_folders import (
    refuse_dangling_link,
    refuse_mistaken_folder,
)
from bge_rerank_integrations.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
# Files in which sentence-transformers describes how a model's inputs are built.
INPUT_FILES: Final = ("modules.json", "config_sentence_transformers.json", "sentence_*config.json")
_LFS_POINTER: Final = b"version https://git-lfs"
_TO_SAFETENSORS: Final = (
    "Convert it once with: AutoModelForSequenceClassification.from_pretrained(MODEL)"
    ".save_pretrained(FOLDER), from transformers, on a machine where you trust the file"
)


def require_file(folder: Path, name: str) -> Path:
    """Return the path of a file of the checkpoint.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        CorruptCheckpointError: The file is a Git LFS pointer.
    """
    path = folder / name
    if not path.is_file():
        refuse_dangling_link(path)
        if name == "config.json" or not any((folder / weights).is_file() for weights in (WEIGHTS, INDEX)):
            refuse_mistaken_folder(folder)
        hint = ""
        if name == "tokenizer.json":
            hint = "; write it with AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
        raise CheckpointNotFoundError(f"{folder} contains no {name}{hint}{_cache_hint(folder)}")
    refuse_lfs_pointer(path)
    return path


def weight_files(folder: Path) -> list[Path]:
    """Return the files that contain a checkpoint's weights, sorted by name.

    Raises:
        CheckpointNotFoundError: There are no such files, or a shard is missing.
        CorruptCheckpointError: The index of the shards is damaged.
        UnsupportedCheckpointError: The weights are pickled.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = read_json(require_file(folder, INDEX)).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CorruptCheckpointError(f"{folder / INDEX} names no weight files; download it again")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise CorruptCheckpointError(f"{folder / INDEX} names a weight file outside its folder")
        return [require_file(folder, name) for name in sorted(set(names.values()))]
    for path in (folder / WEIGHTS, folder / INDEX):
        refuse_dangling_link(path)
    refuse_mistaken_folder(folder)
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise UnsupportedCheckpointError(
            f"{folder} has pickled weights only, which can run code when they are loaded. {_TO_SAFETENSORS}"
        )
    raise CheckpointNotFoundError(
        f"{folder} contains no {WEIGHTS}. If the model is published only as pytorch_model.bin: "
        f"{_TO_SAFETENSORS}{_cache_hint(folder)}"
    )


def _cache_hint(folder: Path) -> str:
    """Return what to do if a folder in a hub cache lacks a file because its download was interrupted."""
    if folder.parent.name != "snapshots":
        return ""
    return ". If the download of the model was interrupted, load it once with a connection to the hub"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains a JSON object.

    Raises:
        CorruptCheckpointError: The file contains something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not valid JSON; download it again") from error
    if not isinstance(data, dict):
        raise CorruptCheckpointError(f"{path} is not a JSON object; download it again")
    return data


def fingerprint(folder: Path) -> str:
    """Return a digest that identifies a checkpoint, without reading all of its weights.

    The digest covers the config, the tokenizer and the files that describe the model's inputs. Of each weight
    file it covers the name, the size, and the first and last megabyte.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update(require_file(folder, name).read_bytes())
    for path in sorted(path for pattern in INPUT_FILES for path in folder.glob(pattern)):
        digest.update(path.read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
    return digest.hexdigest()


def identity(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return the path, size and modification time of the files of a checkpoint, which identify its model."""
    paths = [path.resolve() for path in (require_file(folder, "config.json"), *weight_files(folder))]
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def verify_sha256(folder: Path, sha256: str) -> None:
    """Compare the SHA-256 digest of the weight files, read in the order of their names, with `sha256`.

    Raises:
        CorruptCheckpointError: The digests differ.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise CorruptCheckpointError(
            f"{folder}: the weights have sha256 {digest.hexdigest()}, which is not the expected one; they "
            "were changed or damaged, or belong to another revision"
        )


def refuse_lfs_pointer(path: Path) -> None:
    """Raise `CorruptCheckpointError` if a file is a Git LFS pointer."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CorruptCheckpointError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )
