"""The settings of the HTTP server."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
from pathlib import Path
from typing import Final

from bge_rerank_integrations.api_key import API_KEY_VARIABLE, is_api_key
from bge_rerank_integrations.errors import ConfigError
from bge_rerank_integrations.validation import MAX_TIMEOUT_S

DEFAULT_GRACE_S: Final = 30.0
DEFAULT_MAX_QUEUED_TOKENS: Final = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The limits and the API key of the server. `ScorerConfig` has the settings of the model.

    Attributes:
        api_key: The key that clients must send in the header `Authorization`. None accepts every client.
        max_body_mib: Maximum size of a request body in MiB, after decompression.
        timeout_s: Maximum time in seconds to read a request body. The same limit applies to scoring the
            request. At most a year.
        model_name: Name of the model in `/v1/models`, and in responses to requests that name no model. None
            is the last part of the `model` of the scorer.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> ServerSettings(api_key="secret", timeout_s=10.0)
        ServerSettings(max_body_mib=32.0, timeout_s=10.0, model_name=None)
    """

    api_key: str | None = dataclasses.field(default=None, repr=False)
    max_body_mib: float = 32.0
    timeout_s: float = 60.0
    model_name: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not is_api_key(self.api_key):
            raise ConfigError("the API key must be printable ASCII without spaces, and not empty")
        check_seconds("timeout_s", self.timeout_s)
        if not self.max_body_mib > 0 or not math.isfinite(self.max_body_mib):
            raise ConfigError("max_body_mib must be a positive number")

    @property
    def max_body_bytes(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mib * 1024 * 1024)


def read_api_key(file: Path | None) -> str | None:
    """Return the API key from a file, or from `BGE_RERANK_API_KEY` if no file is given.

    Raises:
        ConfigError: The file cannot be read, or it is empty.
    """
    if file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="utf-8-sig").strip()  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {file} cannot be read ({type(error).__name__})") from None
    if not key:
        raise ConfigError(f"the key file {file} is empty")
    return key


def check_exposure(host: str, api_key: str | None, *, no_auth: bool) -> None:
    """Raise unless other machines need a key to connect, or `no_auth` allows them to connect without one.

    Raises:
        ConfigError: The host is not a loopback address, there is no key, and `no_auth` is False. Or there is
            a key and `no_auth` is True.
    """
    if no_auth and api_key is not None:
        raise ConfigError("--no-auth contradicts the API key that is set; remove one of them")
    if api_key is None and not no_auth and not _is_loopback(host):
        raise ConfigError(
            f"host {host!r} is not a loopback address, so other machines may connect, and no API key is "
            f"set; set {API_KEY_VARIABLE} or --api-key-file, or accept every client with --no-auth"
        )


def check_seconds(name: str, value: float) -> None:
    """Raise `ConfigError` unless a value is a positive number of seconds, at most a year."""
    if not 0 < value <= MAX_TIMEOUT_S:
        raise ConfigError(f"{name} must be a positive number of seconds, at most {MAX_TIMEOUT_S}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
