"""Finds the folder of a checkpoint, and downloads the checkpoint from the hub if necessary."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bge_rerank_integrations.config import EMBEDDED_MODEL, LOCAL_REVISION, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.files import INDEX, INPUT_FILES
from bge_rerank_integrations.engine.checkpoint.mistaken_folders import (
    ADAPTER_CONFIG,
    download_command,
)
from bge_rerank_integrations.errors import (
    CheckpointNotFoundError,
    ConfigError,
    HubUnreachableError,
)

EMBEDDED_FOLDER: Final = Path(__file__).parents[2] / "embedded"


def find_checkpoint(config: ScorerConfig) -> Path:
    """Return the local folder of a checkpoint. Download the checkpoint from the hub if necessary.

    The model `embedded` is always the one that comes with this package. To use a folder of that name in the
    working directory, write `./embedded`.

    Raises:
        ConfigError: The config names a revision, but the model is a local folder.
        CheckpointNotFoundError: The folder, repository or revision does not exist, or access is denied. Or
            this package is inside a zip archive.
        HubUnreachableError: The hub does not answer, and the cache does not contain the model.
    """
    if config.model == EMBEDDED_MODEL:
        return _require_embedded()
    try:
        path = Path(config.model).expanduser()
        is_folder = path.is_dir()
    except (RuntimeError, OSError, ValueError) as error:  # `~name` of an unknown user, or not a valid path
        raise CheckpointNotFoundError(f"model folder {config.model!r} does not exist") from error
    if is_folder:
        if config.revision is not None:
            raise ConfigError(LOCAL_REVISION.format(model=config.model))
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"model {config.model!r} is a file; pass the folder that contains it")
    if path.is_absolute() or config.model[0] in ".~" or (os.sep == "\\" and "\\" in config.model):
        raise CheckpointNotFoundError(f"model folder {config.model!r} does not exist")
    return _download(config)


def _require_embedded() -> Path:
    if not EMBEDDED_FOLDER.is_dir():
        raise CheckpointNotFoundError(
            f"the embedded model is not in {EMBEDDED_FOLDER}. Install this package with pip: it cannot read "
            "the model from a zip archive, or from an installation with Python modules only"
        )
    return EMBEDDED_FOLDER


def _download(config: ScorerConfig) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # Some releases of the hub library do not check these.
    if not _is_name(config.revision, str.encode):
        raise CheckpointNotFoundError(f"revision {config.revision!r} is not a valid name")
    if not _is_name(config.cache_folder, os.fsencode):
        raise CheckpointNotFoundError(f"cache_folder {config.cache_folder!r} is not a valid name")
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
            f"{what} is neither an existing folder nor a valid hub id ('organisation/name')"
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
    except OSError as error:  # network errors, and huggingface_hub's errors for an unreachable hub
        raise HubUnreachableError(
            f"{what} is not an existing local folder, is not in the local cache, and the hub could not be "
            "reached. To work offline, download it once on a connected machine "
            f"(`{download_command(config.model)}`), copy that folder to this machine and pass its path as "
            "the model. Or set cache_folder to a cache that contains it, with local_files_only=True. Or use "
            f'model="{EMBEDDED_MODEL}", the small English model that comes with this package'
        ) from error


def _is_name(name: str | None, encode: Callable[[str], bytes]) -> bool:
    try:
        return name is None or b"\0" not in encode(name)
    except UnicodeEncodeError:
        return False
