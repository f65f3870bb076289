"""Downloads a checkpoint from the hub, and says what to do if that is not possible."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.config import EMBEDDED_MODEL, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.files import INDEX, INPUT_FILES
from bge_rerank_integrations.engine.checkpoint.mistaken_folders import ADAPTER_CONFIG, download_command
from bge_rerank_integrations.errors import CheckpointError, CheckpointNotFoundError, HubUnreachableError
from bge_rerank_integrations.runtime.shutdown import join_until
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

_CREDENTIALS: Final = re.compile(r"//[^/\s]*@")  # of a proxy, in a URL


def download_checkpoint(config: ScorerConfig) -> Path:
    """Return the folder of a checkpoint in the local cache. Download what is missing from the hub.

    The name of the folder is the commit.

    Raises:
        CheckpointNotFoundError: The repository or revision does not exist, or access is denied.
        HubUnreachableError: The hub does not answer, or the download fails.
        CheckpointError: The cache cannot be written.
    """
    from huggingface_hub import errors

    # Some releases of the hub library do not check these.
    if not _is_name(config.revision, str.encode):
        raise CheckpointNotFoundError(f"revision {config.revision!r} is not a valid name")
    if not _is_name(config.cache_folder, os.fsencode):
        raise CheckpointNotFoundError(f"cache_folder {config.cache_folder!r} is not a valid name")
    what = f"model {config.model!r}" + (f" at revision {config.revision!r}" if config.revision else "")
    try:
        return Path(
            _download(
                config.model,
                revision=config.revision,
                cache_dir=config.cache_folder,
                local_files_only=config.local_files_only,
                allow_patterns=[
                    "config.json",
                    "tokenizer.json",
                    "model.safetensors",
                    "model-*-of-*.safetensors",
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
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(
            f"model {config.model!r} is on the hub, but has no revision {config.revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{what} is neither an existing local folder nor on the hub; if it is private, log in with "
            "`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubUnreachableError(
            f"{what} is not an existing local folder, is not complete in the local cache, and "
            f"{_why_not_downloaded(config, error)}. {_work_offline(config)}"
        ) from error
    except Exception as error:  # the hub library, its HTTP client and its download engine have many types
        raise_if_of_signal_handler(error)
        message = f"{what} could not be downloaded: {_reason(error)}"
        if _is_file_error(error):
            raise CheckpointError(
                f"{message}. Free some space, or set cache_folder to a folder that can be written"
            ) from error
        raise HubUnreachableError(f"{message}. Try again. {_work_offline(config)}") from error


def _download(model: str, **options: Any) -> str:
    """Call `snapshot_download`. Ctrl-C ends the wait for it at once, and the download when more data arrive.

    `snapshot_download` itself would wait for the end of the download before it raises `KeyboardInterrupt`.
    """
    import huggingface_hub
    from huggingface_hub.utils.tqdm import tqdm

    is_stopped = threading.Event()

    class Bar(tqdm):
        """A progress bar that is shown on a terminal only, and that stops the download."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = kwargs.get("disable") or None  # None: unless stderr is a terminal
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if is_stopped.is_set():
                raise InterruptedError("the download was stopped")
            return super().update(n)

    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(huggingface_hub.snapshot_download(model, tqdm_class=Bar, **options))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="bge-rerank-download", daemon=True)
    thread.start()
    try:
        join_until([thread], None)
    finally:
        is_stopped.set()
    return result.result()


def _why_not_downloaded(config: ScorerConfig, error: Exception) -> str:
    import huggingface_hub

    if config.local_files_only:
        return "local_files_only=True forbids a download"
    if huggingface_hub.is_offline_mode():
        return "the environment variable HF_HUB_OFFLINE forbids a download"
    return f"the hub could not be used ({_reason(error.__cause__ or error)})"


def _work_offline(config: ScorerConfig) -> str:
    return (
        f"To work offline, download it once on a connected machine (`{download_command(config.model)}`), "
        "copy that folder to this machine and pass its path as the model. Or set cache_folder to a cache "
        f'that contains it, with local_files_only=True. Or use model="{EMBEDDED_MODEL}", the small English '
        "model that comes with this package"
    )


def _reason(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):  # its message contains a URL, which may be a signed one
        return f"the hub answered with status {error.response.status_code}"
    kind = type(error).__name__
    line = _CREDENTIALS.sub("//", first_line(error).rstrip("."))
    if kind == "InvalidURL":  # its message may contain a part of a proxy's password
        return f"{kind}; check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY in the environment"
    return f"{kind}: {line}" if line else kind


def _is_file_error(error: Exception) -> bool:
    """Return whether an error comes from a file, not from a connection."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)


def _is_name(name: str | None, encode: Callable[[str], bytes]) -> bool:
    try:
        return name is None or b"\0" not in encode(name)
    except UnicodeEncodeError:
        return False
