"""Recognizes folders that are often mistaken for a supported checkpoint, and says what to use instead."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.config import EMBEDDED_MODEL
from bge_rerank_integrations.errors import CheckpointNotFoundError, UnsupportedCheckpointError

ADAPTER_CONFIG: Final = "adapter_config.json"

_SUPPORTED: Final = (
    "This package runs XLM-RoBERTa cross-encoders: use BAAI/bge-reranker-base, BAAI/bge-reranker-large, "
    f"BAAI/bge-reranker-v2-m3 or {EMBEDDED_MODEL!r}, the small English model that comes with it"
)
_WEIGHTS: Final = ("model*.safetensors", "pytorch_model*.bin")
# Maps the end of the name of a class in transformers to what models of that class are.
_KINDS: Final[tuple[tuple[str, str], ...]] = (
    ("ForSequenceClassification", "It is a cross-encoder or another classifier, of another model family"),
    ("ForCausalLM", "It is a language model, as some rerankers are"),
    ("ForMaskedLM", "A pretrained model has no relevance head and cannot rerank"),
    ("Model", "An embedding model has no relevance head and cannot rerank"),
)
_MAX_NAMED: Final = 5
_MERGE: Final = (
    'python -c "from peft import PeftModel; '
    "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T; "
    "base, lora, merged = {base!r}, {folder!r}, 'merged'; "
    "PeftModel.from_pretrained(M.from_pretrained(base), lora).merge_and_unload().save_pretrained(merged); "
    'T.from_pretrained(base).save_pretrained(merged)"'
)


def describe_other_model(model_type: object, architectures: object) -> str:
    """Return a description of a model of another architecture, and of the models to use instead.

    Args:
        model_type: The value of `model_type` in config.json.
        architectures: The value of `architectures` in config.json: a list of classes of transformers, or
            None.
    """
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    kinds = [f"{kind}. " for name in names for end, kind in _KINDS if name.endswith(end)]
    classes = f" for {', '.join(names)}" if names else ""
    return f"is a {model_type!r} checkpoint{classes}. {''.join(kinds[:1])}{_SUPPORTED}"


def refuse_dangling_link(path: Path) -> None:
    """Raise `CheckpointNotFoundError` if a path is a symbolic link to a file that does not exist."""
    if path.is_symlink() and not path.exists():
        raise CheckpointNotFoundError(
            f"{path} is a link to a file that does not exist. A hub cache stores files in its folder `blobs` "
            "and links to them. Copy the cache with `cp -rL`, which copies the files, or download the model "
            f"into a separate folder: `{download_command('MODEL')}`"
        )


def refuse_mistaken_folder(folder: Path) -> None:
    """Raise a helpful error if a folder that lacks a config or weights is recognized as something else.

    Raises:
        UnsupportedCheckpointError: The folder contains a LoRA adapter.
        CheckpointNotFoundError: The folder is a hub cache or part of one, or its subfolders are checkpoints.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UnsupportedCheckpointError(
            f"{folder} is a LoRA adapter, not a complete model. Merge it into its base model first, then "
            f"pass the folder `merged` as the model: `{_merge_command(folder)}`"
        )
    if (folder / "snapshots").is_dir() or folder.name.startswith("models--"):
        _refuse_cache_entry(folder)
    cached = sorted(path for path in folder.glob("models--*") if path.is_dir())
    if cached:
        raise CheckpointNotFoundError(
            f"{folder} is a hub cache with {_listed([_model_name(path) for path in cached])}. Pass one of "
            "these names as the model and this folder as cache_folder, with local_files_only=True"
        )
    inside = _checkpoints_in(folder)
    if inside:
        raise CheckpointNotFoundError(
            f"{folder} contains no checkpoint, but its subfolders do; pass one of them as the model: "
            f"{_listed(list(map(str, inside)))}"
        )


def download_command(model: str) -> str:
    """Return the command that downloads a model from the hub into a folder that can be copied."""
    return f"hf download {model} --local-dir {model.rpartition('/')[2]}"


def _refuse_cache_entry(folder: Path) -> None:
    name = _model_name(folder)
    snapshots = _checkpoints_in(folder / "snapshots") if (folder / "snapshots").is_dir() else []
    for snapshot in snapshots:
        refuse_dangling_link(snapshot / "config.json")
    if snapshots:
        raise CheckpointNotFoundError(
            f"{folder} is an entry of a hub cache; its snapshots contain the checkpoint. Pass one of them as "
            f"the model: {_listed(list(map(str, snapshots)))}. Or pass {name!r} as the model and "
            f"{str(folder.parent)!r} as cache_folder, with local_files_only=True"
        )
    raise CheckpointNotFoundError(
        f"{folder} is an entry of a hub cache, but none of its snapshots contains a checkpoint. Download the "
        f"model into a separate folder: `{download_command(name)}`"
    )


def _merge_command(folder: Path) -> str:
    try:
        base: Any = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = base["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    return _MERGE.format(base=base if isinstance(base, str) and base else "BASE_MODEL", folder=str(folder))


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the subfolders that contain a checkpoint, with numbers (`checkpoint-500`) in numeric order."""

    def order(path: Path) -> tuple[str, int, str]:
        number = re.search(r"\d+$", path.name)
        return (path.name.rstrip("0123456789"), int(number[0]) if number else 0, path.name)

    return sorted((path for path in folder.iterdir() if path.is_dir() and _looks_complete(path)), key=order)


def _looks_complete(folder: Path) -> bool:
    """Return whether a folder lists the files of a checkpoint or an adapter. Links are not followed."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # such as `lost+found`, which only root may read
        return False
    has_weights = any(fnmatch(name, pattern) for name in names for pattern in _WEIGHTS)
    return ADAPTER_CONFIG in names or ("config.json" in names and has_weights)


def _model_name(folder: Path) -> str:
    """Return the hub id, such as `org/name`, of a folder `models--org--name` in a hub cache."""
    return folder.resolve().name.removeprefix("models--").replace("--", "/")


def _listed(names: list[str]) -> str:
    # The user most likely wants one of the last numbered checkpoints.
    shown = ", ".join(names[-_MAX_NAMED:])
    return shown if len(names) <= _MAX_NAMED else f"{shown} and {len(names) - _MAX_NAMED} more"
