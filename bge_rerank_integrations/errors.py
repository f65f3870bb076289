"""All exceptions that this package raises on purpose.

```
RerankError
├── ConfigError (ValueError)            a setting is out of range or contradicts another one
├── InputError (ValueError)             an argument of a call is invalid; has .index
│   └── InputTypeError (TypeError)      an argument of a call has the wrong type
├── CheckpointError                     the model cannot be used
│   ├── CheckpointNotFoundError         the folder, repository, revision or file does not exist
│   ├── HubUnreachableError             the model could not be downloaded from the hub
│   ├── UnsupportedCheckpointError      the model is not a one-label XLM-RoBERTa cross-encoder
│   └── CorruptCheckpointError          the files are damaged, incomplete or contain NaN or infinity
├── DatasetError                        a file of queries, passages, judgements or results is unusable
├── DeviceError (RuntimeError)          the device is not available
│   └── DeviceLostError                 the device failed while it was in use and does not recover
├── NonFiniteScoreError (ArithmeticError)  the model returned NaN or infinity; has .index
├── QueueFullError                      the request does not fit under max_queued_tokens
├── RequestTimeoutError (TimeoutError)  the call did not finish within its timeout
├── ScorerClosedError (RuntimeError)    the scorer was used after close()
├── WorkerDiedError (RuntimeError)      a worker thread ended unexpectedly; the next call starts a new one
├── RemoteError                         a rerank server gave an unusable answer
│   ├── ServerUnreachableError (ConnectionError)  the server does not answer or takes no requests now
│   └── AuthenticationError (PermissionError)     the server does not accept the API key
├── ForkedProcessError (RuntimeError)   the process was forked after a model had been loaded
└── MissingExtraError (ImportError)     an optional dependency is not installed
```

A message names the setting, or the index of the invalid item. It never contains the text of a query or
passage.

Example:
    >>> try:
    ...     ranking = scorer.rank("what is a panda?", ["hi", "The giant panda is a bear."], timeout=30)
    ... except RequestTimeoutError:
    ...     ranking = []  # fall back to the order of the retriever
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "CorruptCheckpointError",
    "DatasetError",
    "DeviceError",
    "DeviceLostError",
    "ForkedProcessError",
    "HubUnreachableError",
    "InputError",
    "InputTypeError",
    "MissingExtraError",
    "NonFiniteScoreError",
    "QueueFullError",
    "RemoteError",
    "RequestTimeoutError",
    "RerankError",
    "ScorerClosedError",
    "ServerUnreachableError",
    "UnsupportedCheckpointError",
    "WorkerDiedError",
    "missing_extra",
]


class RerankError(Exception):
    """Base class of all exceptions that this package raises on purpose."""


class ConfigError(RerankError, ValueError):
    """A setting is out of range or contradicts another one, or a dictionary has an unknown setting."""


class InputError(RerankError, ValueError):
    """An argument of a call is invalid.

    Attributes:
        index: Position of the invalid pair, passage, document, node or request in its list. None if the error
            does not concern an item of a list.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class InputTypeError(InputError, TypeError):
    """An argument of a call has the wrong type."""


class CheckpointError(RerankError):
    """A checkpoint cannot be used. The message says what to do about it."""


class CheckpointNotFoundError(CheckpointError):
    """The checkpoint's folder, repository or revision does not exist, or it lacks a required file."""


class HubUnreachableError(CheckpointError):
    """The checkpoint is not in the local cache, and it could not be downloaded from the model hub."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint is not a one-label XLM-RoBERTa cross-encoder in safetensors format."""


class CorruptCheckpointError(CheckpointError):
    """The checkpoint's files are damaged or incomplete, or they contain NaN or infinity."""


class DatasetError(RerankError):
    """A file of queries, passages, judgements or results is missing or malformed, or cannot be written.

    The message names the file, and the line if there is one.
    """


class DeviceError(RerankError, RuntimeError):
    """The device, or a precision that was chosen for it, is not available."""


class NonFiniteScoreError(RerankError, ArithmeticError):
    """The model returned NaN or infinity.

    Attributes:
        index: Position of the first pair or passage with such a score, in the order of the caller's list.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class DeviceLostError(DeviceError):
    """The device failed while it was in use and does not recover. Start a new process."""


class QueueFullError(RerankError):
    """The request does not fit into the queue under `max_queued_tokens`.

    Attributes:
        never_fits: Whether the request alone has more tokens than that. Otherwise, try again later.
    """

    def __init__(self, message: str, *, never_fits: bool = False) -> None:
        super().__init__(message)
        self.never_fits = never_fits


class RequestTimeoutError(RerankError, TimeoutError):
    """A request did not finish within its timeout. Its sequences that had not started were dropped."""


class WorkerDiedError(RerankError, RuntimeError):
    """A worker thread ended unexpectedly while a request waited. The next call starts a new worker."""


class RemoteError(RerankError):
    """A rerank server or a Ray Serve application gave an answer that cannot be used."""


class ServerUnreachableError(RemoteError, ConnectionError):
    """A rerank server does not answer, or it accepts no requests at the moment."""


class AuthenticationError(RemoteError, PermissionError):
    """A rerank server does not accept the API key, or it requires one."""


class ForkedProcessError(RerankError, RuntimeError):
    """The process was forked from a process that had loaded a model."""


class ScorerClosedError(RerankError, RuntimeError):
    """The scorer was used after `close()`, or closed while the request waited."""

    def __init__(self, message: str = "this scorer is closed; create a new one") -> None:
        super().__init__(message)


class MissingExtraError(RerankError, ImportError):
    """An optional dependency is not installed. The message contains the command that installs it."""


def missing_extra(extra: str, package: str) -> MissingExtraError:
    """Return the exception for an optional dependency that is not installed.

    Args:
        extra: The extra of this package that installs the dependency.
        package: The name of the dependency on the package index.

    Returns:
        The exception, for the caller to raise.

    Example:
        >>> raise missing_extra("langchain", "langchain-core")
        Traceback (most recent call last):
        bge_rerank_integrations.errors.MissingExtraError: langchain-core is not installed, or too old.
        Install it with: pip install "bge-rerank-integrations[langchain]"
    """
    return MissingExtraError(
        f"{package} is not installed, or too old. Install it with: "
        f'pip install "bge-rerank-integrations[{extra}]"'
    )
