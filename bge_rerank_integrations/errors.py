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
├── DeviceError (RuntimeError)          the device or attention kernel asked for is not there
├── NonFiniteScoreError                 the model returned NaN or inf; has .index
├── ScorerClosedError (RuntimeError)    used after close()
└── MissingExtraError (ImportError)     an optional framework is not installed
```

Messages name the setting or the index of the offending item, never its text.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "CorruptCheckpointError",
    "DeviceError",
    "HubUnreachableError",
    "InputError",
    "InputTypeError",
    "MissingExtraError",
    "NonFiniteScoreError",
    "RerankError",
    "ScorerClosedError",
    "UnsupportedCheckpointError",
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


class ScorerClosedError(RerankError, RuntimeError):
    """The scorer was used after `close()`."""


class MissingExtraError(RerankError, ImportError):
    """An optional dependency is not installed; the message holds the command that installs it."""


def missing_extra(extra: str, package: str) -> MissingExtraError:
    """Build the error for an optional dependency that is not installed.

    Args:
        extra: Name of this package's extra that brings it.
        package: What is missing, as the user knows it.

    Example:
        >>> raise missing_extra("langchain", "langchain-core")
        Traceback (most recent call last):
        bge_rerank_integrations.errors.MissingExtraError: langchain-core is not installed. Install it
        with: pip install "bge-rerank-integrations[langchain]"
    """
    return MissingExtraError(
        f'{package} is not installed. Install it with: pip install "bge-rerank-integrations[{extra}]"'
    )
