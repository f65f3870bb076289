"""Every error this package raises on purpose.

```
RerankError
├── ConfigError (ValueError)            a setting that cannot work
├── InputError (ValueError)             a query, passage or argument of one call; has .index
│   └── InputTypeError (TypeError)      ... of the wrong type
├── CheckpointError                     a model that cannot be used
│   ├── CheckpointNotFoundError         no such folder, repository, revision or file
│   ├── HubUnreachableError             the model hub did not answer
│   ├── UnsupportedCheckpointError      intact, but not a one-label XLM-RoBERTa cross-encoder
│   └── CorruptCheckpointError          damaged, incomplete or not finite
├── DatasetError                        a file of queries, passages, judgements or results is unusable
├── DeviceError (RuntimeError)          the device is not there
│   └── DeviceLostError                 ... or failed for good while it was in use
├── NonFiniteScoreError                 the model returned NaN or inf; has .index
├── QueueFullError                      more is waiting than max_queued_tokens allows; try again later
├── RequestTimeoutError (TimeoutError)  not finished within the call's timeout
├── ScorerClosedError (RuntimeError)    used after close()
├── WorkerDiedError (RuntimeError)      the thread that feeds the device ended; the next call starts another
├── RemoteError                         a rerank server answered with what cannot be used
│   ├── ServerUnreachableError (ConnectionError)  it does not answer, or cannot take requests now
│   └── AuthenticationError (PermissionError)     it does not accept the API key
├── ForkedProcessError (RuntimeError)   used in a child that was forked after its parent had loaded a model
└── MissingExtraError (ImportError)     an optional framework is not installed
```

Messages name the setting or the index of the offending item, never its text.
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
    """Base of all errors raised on purpose by this package."""


class ConfigError(RerankError, ValueError):
    """A setting that is unknown, out of range or contradicts another."""


class InputError(RerankError, ValueError):
    """One call's argument is wrong.

    Attributes:
        index: Position of the offending pair, passage, document or node; None where there is none.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class InputTypeError(InputError, TypeError):
    """One call's argument has the wrong type."""


class CheckpointError(RerankError):
    """A checkpoint cannot be used; the message says what to do about it."""


class CheckpointNotFoundError(CheckpointError):
    """The folder, repository, revision or a needed file of it does not exist."""


class HubUnreachableError(CheckpointError):
    """The model hub could not be reached and the checkpoint is not in the local cache."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint is not a one-label XLM-RoBERTa cross-encoder in safetensors."""


class CorruptCheckpointError(CheckpointError):
    """The checkpoint's files are damaged, incomplete or hold values that are not finite."""


class DatasetError(RerankError):
    """A file of queries, passages, judgements or results is missing or malformed; says which line."""


class DeviceError(RerankError, RuntimeError):
    """The device, or something named explicitly for it, is not available."""


class NonFiniteScoreError(RerankError, ArithmeticError):
    """The model returned NaN or infinity.

    Attributes:
        index: Position, in the order the caller gave, of the first such pair or passage.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class DeviceLostError(DeviceError):
    """The device failed for good while it was in use; a new process is needed."""


class QueueFullError(RerankError):
    """More tokens are waiting than `max_queued_tokens` allows; try again later."""


class RequestTimeoutError(RerankError, TimeoutError):
    """A request was not finished within its call's timeout; what had not started was not computed."""


class WorkerDiedError(RerankError, RuntimeError):
    """The thread that feeds the device ended while a request waited; the next call starts another."""


class RemoteError(RerankError):
    """A rerank server answered with something that cannot be used, such as an unknown error."""


class ServerUnreachableError(RemoteError, ConnectionError):
    """A rerank server does not answer, or cannot take requests now."""


class AuthenticationError(RemoteError, PermissionError):
    """A rerank server does not accept the API key, or asks for one."""


class ForkedProcessError(RerankError, RuntimeError):
    """The process was forked from one that had loaded a model."""


class ScorerClosedError(RerankError, RuntimeError):
    """The scorer was used after `close()`."""


class MissingExtraError(RerankError, ImportError):
    """An optional dependency is not installed; the message holds the command that installs it."""


def missing_extra(extra: str, package: str) -> MissingExtraError:
    """Build the error for an optional dependency that is not installed.

    Args:
        extra: The extra of this package that brings it.
        package: What is missing, as the user knows it.

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
