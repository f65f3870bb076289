"""Finds the folder of a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Final

from bge_rerank_integrations.config import EMBEDDED_MODEL, LOCAL_REVISION, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.download import download_checkpoint
from bge_rerank_integrations.errors import CheckpointError, CheckpointNotFoundError, ConfigError

EMBEDDED_FOLDER: Final = Path(__file__).parents[2] / "embedded"


def find_checkpoint(config: ScorerConfig) -> Path:
    """Return the local folder of a checkpoint. Download the checkpoint from the hub if necessary.

    The model `embedded` is always the one that comes with this package. To use a folder of that name in the
    working directory, write `./embedded`.

    Raises:
        ConfigError: The config names a revision, but the model is a local folder.
        CheckpointNotFoundError: The folder, repository or revision does not exist, or access is denied. Or
            this package is inside a zip archive.
        HubUnreachableError: The cache does not contain the model, and the hub does not answer or the download
            fails.
        CheckpointError: The folder cannot be read, or the cache cannot be written.
    """
    return _find_folder(config) or download_checkpoint(config)


def pin_checkpoint(config: ScorerConfig) -> ScorerConfig:
    """Return a config that always finds the same checkpoint. Download the checkpoint if necessary.

    The branch of a repository on the hub may move. The returned config names a commit instead.

    Raises:
        CheckpointError, ConfigError: For the same reasons as `find_checkpoint`.
    """
    if _find_folder(config) is not None:
        return config
    return dataclasses.replace(config, revision=download_checkpoint(config).name)


def _find_folder(config: ScorerConfig) -> Path | None:
    """Return the folder that a model names, or None if the model is a repository on the hub."""
    if config.model == EMBEDDED_MODEL:
        return _require_embedded()
    try:
        path = Path(config.model).expanduser()
        is_folder = path.is_dir()
    except PermissionError as error:
        raise CheckpointError(f"model folder {config.model!r} cannot be read: {error.strerror}") from error
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
    return None


def _require_embedded() -> Path:
    if not EMBEDDED_FOLDER.is_dir():
        raise CheckpointNotFoundError(
            f"the embedded model is not in {EMBEDDED_FOLDER}. Install this package with pip: it cannot read "
            "the model from a zip archive, or from an installation with Python modules only. PyInstaller "
            "needs `--collect-data bge_rerank_integrations`"
        )
    return EMBEDDED_FOLDER
