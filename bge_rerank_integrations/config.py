"""The settings of a scorer. They are validated once, immutable, hashable and JSON-serializable."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from bge_rerank_integrations.errors import ConfigError

DEFAULT_MODEL: Final = "BAAI/bge-reranker-base"
EMBEDDED_MODEL: Final = "embedded"
DEFAULT_WINDOW_OVERLAP: Final = 64

Accepted = TypeVar("Accepted")
Kept = TypeVar("Kept")

DType = Literal["auto", "float32", "float16", "bfloat16", "float8", "int8"]
LongPassages = Literal["truncate", "windows"]
TruncationSide = Literal["right", "left"]
BlankPassages = Literal["last", "refuse"]

# <s> query </s></s> passage </s>
NUM_SPECIAL_TOKENS: Final = 4

_DEVICE = re.compile(r"auto|cpu(:(0|[1-9][0-9]{0,2}))?|cuda(:(?P<index>0|[1-9][0-9]{0,2}))?|mps")
# torch stores the index of a device in a signed byte, and silently wraps larger numbers around.
_MAX_DEVICE_INDEX: Final = 127

# More than the cores of any processor. Tens of thousands of threads would crash the process.
_MAX_NUM_THREADS: Final = 1024
# Longer than any XLM-RoBERTa checkpoint allows. The loaded model has its own, lower limit.
_MAX_LENGTH: Final = 65_536
# Kernels of attention take at most 65,535 sequences on a GPU, and a pair has at least four tokens.
_MAX_BATCH_TOKENS: Final = 4 * 65_535
# The token ids alone of this many tokens take 4 TB.
_MAX_QUEUED_TOKENS: Final = 1 << 40


class Setting(Generic[Accepted, Kept]):
    """A dataclass field that accepts more types than it stores.

    Type checkers take the type of the constructor's argument from `__set__` and the type of the attribute
    from `__get__`.

    Args:
        default: The default value.
        convert: Converts an accepted value to the stored type. It returns every other value unchanged, so
            that the checks of the dataclass can reject it.
    """

    def __init__(self, default: Kept, convert: Callable[[Any], Any]) -> None:
        self._default = default
        self._convert = convert
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Kept:
        if instance is None:
            return self._default
        value: Kept = instance.__dict__[self._name]
        return value

    def __set__(self, instance: object, value: Accepted) -> None:
        instance.__dict__[self._name] = self._convert(value)


def path_to_str(value: Any) -> Any:
    """Return a path as a string, and any other value unchanged."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def sequence_to_tuple(value: Any) -> Any:
    """Return a sequence as a tuple, and a string or any other value unchanged."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """All settings that decide which model a `Scorer` loads and how it scores.

    On one machine, two scorers with equal configs give equal scores. `Scorer.shared` therefore keeps one
    loaded model per config and process. The config never contains a hub token. The hub library takes the
    token from its own login or from the environment variable `HF_TOKEN`.

    Attributes:
        model: Hub id or local folder of a one-label `XLMRobertaForSequenceClassification`, or `embedded`. The
            name `embedded` stands for the small English reranker that comes with this package. It is not a
            BGE model.
        revision: Branch, tag or commit on the hub; None means the default branch.
        sha256: Expected SHA-256 digest of the weights, in 64 lower-case hexadecimal digits; None means no
            check. The command `cat model*.safetensors | sha256sum`, run in the folder of the checkpoint,
            prints it.
        cache_folder: Folder for downloads from the hub; None means the hub library's own cache.
        local_files_only: Use only files that are already on disk, without any network access.
        device: `auto` (the first of CUDA, MPS and CPU that works), `cpu`, `cuda`, `cuda:N` or `mps`.
        devices: Several devices of one kind to use instead of `device`, such as cuda:0 and cuda:1. Each
            device holds a copy of the model, and all devices take batches from one queue. Any sequence of
            names is accepted and stored as a tuple.
        dtype: Precision of the computation; `auto` is float16 on CUDA, bfloat16 on a CPU with AMX, and
            float32 elsewhere. float32 is the reference. The other precisions round, so their scores differ a
            little. With `auto` the scores depend on the machine. Use `float32` to get the same scores on
            every machine. float16 is rejected on a CPU, because CPUs have no fast float16 arithmetic. float8
            needs a CUDA device of compute capability 8.9 or later. It computes matrix products in e4m3 with
            one scale per row, and everything else in bfloat16 or float32. int8 needs an x86-64
            CPU with AVX2 and the extra `int8`. It computes matrix products in int8, the products of attention
            in bfloat16 or float32, and everything else in float32.
        max_length: Maximum length of a pair in tokens, including its four special tokens. The default is 512
            for every model, as in FlagReranker. `bge-reranker-v2-m3` accepts up to 8192.
        query_max_length: Maximum length of a query in tokens; None means three quarters of `max_length`, or
            less if that leaves no token for a passage. A longer query is truncated. `Scorer.stats` counts
            truncated queries, and the first one of a process is logged.
        query_truncation_side: End of a long query that is cut off. `right`, the default and FlagReranker's
            rule, keeps the beginning of the query. `left` keeps its end, which suits queries that start with
            a chat history and end with the question. The query instruction is kept in both cases.
        max_batch_tokens: Maximum number of tokens in one forward pass; None means a value that suits the
            device. A longer pair is computed alone.
        num_threads: Number of CPU threads for the forward pass; None means torch's number, or fewer if the
            CPU affinity of the process or the CPU quota of its cgroup allows fewer. A fractional quota is
            rounded up. A web server with several worker processes needs fewer threads per process. The torch
            settings of other threads do not change.
        capture_graphs: Capture CUDA graphs for batches while the model loads. A graph launches all
            kernels of a small batch at once. Loading takes longer and the graphs need memory on the device.
            Devices other than CUDA ignore this setting.
        max_wait_ms: Maximum time in milliseconds that a request waits for others to fill its batch. With 0,
            the default, an idle device starts at once with everything that is queued.
        max_queued_tokens: Maximum number of tokens in the queue; None means no limit. A request that exceeds
            it raises `QueueFullError` immediately.
        normalize: Apply a sigmoid to each score. False, the default, returns raw logits.
        query_instruction: Text that is put in front of each query, unchanged; None means the checkpoint's
            default prompt. The default prompt is the one that sentence-transformers saved with the
            checkpoint. If there is none, or if this is an empty string, nothing is put in front.
        passage_instruction: Text that is put in front of each passage, unchanged; None means no text.
        long_passages: How to score a passage that is too long. `truncate` cuts it to the tokens that remain
            in `max_length` after the query. `windows` splits it into overlapping windows of that many tokens
            and takes the best score.
        window_overlap_tokens: Number of tokens that neighbouring windows share, for
            `long_passages="windows"`.
        blank_passages: How to rank a passage that is blank: put it `last`, or `refuse` it. A
            passage is blank if it consists of white space, control and format characters, or if
            the tokenizer has no token for any of it. `last` ranks it after all others, without a score from
            the model, and sets `RankedPassage.blank`. `refuse` raises `InputError`. The passage instruction
            does not count as text.

    Raises:
        ConfigError: A value has the wrong type, is out of range, or contradicts another value.

    Example:
        >>> ScorerConfig(model="BAAI/bge-reranker-large", query_max_length=256).effective_query_max_length
        256
    """

    model: Setting[str | os.PathLike[str], str] = Setting(DEFAULT_MODEL, path_to_str)
    revision: str | None = None
    sha256: str | None = None
    cache_folder: Setting[str | os.PathLike[str] | None, str | None] = Setting(None, path_to_str)
    local_files_only: bool = False
    device: str = "auto"
    devices: Setting[Sequence[str] | None, tuple[str, ...] | None] = Setting(None, sequence_to_tuple)
    dtype: DType = "auto"
    max_length: int = 512
    query_max_length: int | None = None
    query_truncation_side: TruncationSide = "right"
    max_batch_tokens: int | None = None
    num_threads: int | None = None
    capture_graphs: bool = True
    max_wait_ms: float = 0.0
    max_queued_tokens: int | None = None
    normalize: bool = False
    query_instruction: str | None = None
    passage_instruction: str | None = None
    long_passages: LongPassages = "truncate"
    window_overlap_tokens: int = DEFAULT_WINDOW_OVERLAP
    blank_passages: BlankPassages = "last"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_model()
        self._check_device()
        self._check_lengths()

    @property
    def effective_query_max_length(self) -> int:
        """Maximum length of a query in tokens. If none was set, it follows from `max_length`."""
        if self.query_max_length is not None:
            return self.query_max_length
        return min(self.max_length * 3 // 4, self.max_length - NUM_SPECIAL_TOKENS - 1)

    def per_device(self) -> list[ScorerConfig]:
        """Return one config for each device, with `device` set and `devices` None."""
        if self.devices is None:
            return [self]
        return [dataclasses.replace(self, device=device, devices=None) for device in self.devices]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScorerConfig:
        """Build a config from a mapping, such as parsed JSON.

        Args:
            data: Names and values of settings. Missing settings get their defaults.

        Returns:
            The config.

        Raises:
            ConfigError: A key is unknown or a value is invalid.

        Example:
            >>> ScorerConfig.from_dict({"model": "embedded", "max_length": 256}).max_length
            256
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"the settings must be a mapping, not {type(data).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(known), key=str)
        if unknown:
            raise ConfigError(f"unknown setting(s) {unknown}; the known settings are {known}")
        return cls(**data)

    def to_dict(self) -> dict[str, str | float | bool | list[str] | None]:
        """Return all settings as a JSON-serializable dict, from which `from_dict` builds an equal config."""
        devices = None if self.devices is None else list(self.devices)
        return {**dataclasses.asdict(self), "devices": devices}

    def _check_types(self) -> None:
        for name in ("model", "device"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name} must be a non-empty string")
        for name in ("revision", "sha256", "cache_folder", "query_instruction", "passage_instruction"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string or None")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError("sha256 must be 64 lower-case hexadecimal digits or None")
        for name in ("local_files_only", "capture_graphs", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False")
        for name, choices in (
            ("dtype", get_args(DType)),
            ("query_truncation_side", get_args(TruncationSide)),
            ("long_passages", get_args(LongPassages)),
            ("blank_passages", get_args(BlankPassages)),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ConfigError(f"{name} must be one of {list(choices)}")
        for name, maximum in (
            ("query_max_length", _MAX_LENGTH),
            ("max_batch_tokens", _MAX_BATCH_TOKENS),
            ("num_threads", _MAX_NUM_THREADS),
            ("max_queued_tokens", _MAX_QUEUED_TOKENS),
        ):
            if getattr(self, name) is not None:
                self._check_integer(name, 1, maximum)
        self._check_integer("max_length", NUM_SPECIAL_TOKENS + 2, _MAX_LENGTH)
        self._check_integer("window_overlap_tokens", 0, _MAX_LENGTH)
        is_number = isinstance(self.max_wait_ms, int | float) and not isinstance(self.max_wait_ms, bool)
        if not is_number or not 0 <= self.max_wait_ms <= 60_000:
            raise ConfigError("max_wait_ms must be a number from 0 to 60,000")

    def _check_integer(self, name: str, minimum: int, maximum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ConfigError(f"{name} must be an integer from {minimum:,} to {maximum:,}")

    def _check_device(self) -> None:
        if self.devices is not None:
            self._check_devices(self.devices)
        for index, device in enumerate(self.devices or (self.device,)):
            match = _DEVICE.fullmatch(device)
            if match is None or int(match["index"] or 0) > _MAX_DEVICE_INDEX:
                name = "device must be 'auto'," if self.devices is None else f"devices[{index}] must be"
                raise ConfigError(
                    f"{name} 'cpu', 'cuda', 'cuda:N' or 'mps', with N from 0 to {_MAX_DEVICE_INDEX}"
                )
            if device.startswith("cpu") and self.dtype == "float16":
                raise ConfigError(FLOAT16_ON_CPU)
            if self.dtype == "float8" and not device.startswith(("auto", "cuda")):
                raise ConfigError(f"{FLOAT8_NEEDS}; device is {device!r}")
            if device.startswith(("cuda", "mps")) and self.dtype == "int8":
                raise ConfigError(INT8_OFF_CPU)

    def _check_devices(self, devices: tuple[str, ...]) -> None:
        if not isinstance(devices, tuple) or not all(isinstance(device, str) for device in devices):
            raise ConfigError("devices must be a list of strings or None")
        if self.device != "auto":
            raise ConfigError("device and devices cannot both be given")
        nameless = next((index for index, device in enumerate(devices) if not device.strip()), None)
        if nameless is not None:
            raise ConfigError(f"devices[{nameless}] is empty; give each device a name, such as 'cuda:0'")
        if not devices or "auto" in devices:
            raise ConfigError("devices must name at least one device, and must not contain 'auto'")
        if len({device.partition(":")[0] for device in devices}) > 1:
            raise ConfigError("devices must be of one kind, so that scores do not depend on the device")
        # 'cuda' means the first CUDA device, and every 'cpu:N' means the only CPU.
        distinct = {"cpu" if device.startswith("cpu") else device for device in devices}
        if len({"cuda:0" if device == "cuda" else device for device in distinct}) < len(devices):
            raise ConfigError("devices must not name a device twice")

    def _check_model(self) -> None:
        if self.model == EMBEDDED_MODEL and self.revision is not None:
            raise ConfigError(
                f"model {EMBEDDED_MODEL!r} comes with this package and has no revisions; leave revision out"
            )

        if self.revision is not None and (self.model[0] in ".~" or Path(self.model).is_absolute()):
            raise ConfigError(LOCAL_REVISION.format(model=self.model))

    def _check_lengths(self) -> None:
        room = self.max_length - NUM_SPECIAL_TOKENS - self.effective_query_max_length
        if room < 1:
            raise ConfigError(
                f"query_max_length {self.effective_query_max_length} leaves no room for a passage in "
                f"max_length {self.max_length} ({NUM_SPECIAL_TOKENS} tokens are special); query_max_length "
                f"can be at most {self.max_length - NUM_SPECIAL_TOKENS - 1}"
            )
        if self.long_passages != "windows" and self.window_overlap_tokens != DEFAULT_WINDOW_OVERLAP:
            raise ConfigError(
                f"window_overlap_tokens {self.window_overlap_tokens} has no effect while long_passages is "
                f"{self.long_passages!r}; set long_passages='windows', or leave window_overlap_tokens out"
            )
        if self.long_passages == "windows" and self.window_overlap_tokens >= room:
            raise ConfigError(
                f"window_overlap_tokens {self.window_overlap_tokens} must be less than the {room} "
                "token(s) that the longest query leaves for a window"
            )


LOCAL_REVISION: Final = (
    "model {model!r} is a local folder, which has no revisions; leave revision out, "
    "or name a model on the hub"
)
FLOAT16_ON_CPU: Final = (
    "dtype 'float16' is not supported on a CPU; use 'float32', use 'bfloat16' if the CPU supports it, or use "
    "a CUDA device"
)
INT8_OFF_CPU: Final = "dtype 'int8' runs on CPUs only; use 'float16' on this device, or set device='cpu'"
FLOAT8_NEEDS: Final = (
    "dtype 'float8' needs a CUDA device with float8 arithmetic (compute capability 8.9 or later)"
)
