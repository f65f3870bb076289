"""The settings of one scorer: validated once, immutable, JSON-safe and hashable."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

from bge_rerank_integrations.errors import ConfigError

DEFAULT_MODEL: Final = "BAAI/bge-reranker-base"
EMBEDDED_MODEL: Final = "embedded"
DEFAULT_WINDOW_OVERLAP: Final = 64

DType = Literal["auto", "float32", "float16", "bfloat16", "float8", "int8"]
LongPassages = Literal["truncate", "windows"]
TruncationSide = Literal["right", "left"]
BlankPassages = Literal["last", "refuse"]

# <s> query </s></s> passage </s>
NUM_SPECIAL_TOKENS: Final = 4

_DEVICE = re.compile(r"auto|cpu(:\d+)?|cuda(:\d+)?|mps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Everything that decides what a `Scorer` loads and how it scores.

    Two scorers with equal configs give equal scores, so the config is the key under which
    `Scorer.shared` keeps one loaded model per process. A hub token is never part of it: it comes from
    the hub library's own login or the `HF_TOKEN` environment variable.

    Attributes:
        model: Hub id or local folder of a reranker, that is of a one-label
            `XLMRobertaForSequenceClassification`; `embedded` is the small English one that comes with this
            package (no BGE model).
        revision: Branch, tag or commit on the hub; None is the default branch.
        sha256: What `cat model*.safetensors | sha256sum` must give, in the checkpoint's folder, for the
            weights to be loaded; None is no check.
        cache_folder: Where hub downloads are kept; None is the hub library's own cache.
        local_files_only: Never ask the network; use what is in the cache.
        device: `auto` (the first of CUDA, MPS, CPU that is there), `cpu`, `cuda`, `cuda:N` or `mps`.
        devices: Several devices of one kind, such as cuda:0 and cuda:1, instead of `device`: each holds a
            copy of the model, and all take batches from one queue. Any sequence of names; kept as a tuple.
        dtype: `auto` (float16 on CUDA, float32 elsewhere), `float32`, `float16`, `bfloat16`, `float8` or
            `int8`. float16 is refused on a CPU, which has no fast arithmetic for it. float8 is for CUDA
            devices from Hopper on: matrix products in e4m3 scaled by row, all else in bfloat16 or float32.
            int8 is for CPUs with VNNI instructions: products in int8, all else in float32; it needs the extra
            `int8`.
        max_length: Longest pair in tokens, its four special tokens included. 512 for every model, as
            in FlagReranker; `bge-reranker-v2-m3` takes up to 8192.
        query_max_length: Longest query in tokens; None is three quarters of `max_length`. A longer query is
            cut, which is counted, and logged once per process.
        query_truncation_side: Which end of a query that is too long is cut. `right`, the default and
            FlagReranker's rule, keeps its beginning; `left` keeps its end, where the question stands in a
            query that begins with a chat history. The query instruction is kept either way.
        max_batch_tokens: Most tokens in one forward pass; None is what suits the device.
        num_threads: CPU threads that the forward pass computes with; None is as many as torch is set to. A
            web server with workers of its own wants fewer. Other threads' torch settings stay as they are.
        max_wait_ms: How long a request may wait for others to share a batch that is not full. 0, the
            default: those that are waiting go together, and an idle device never waits.
        max_queued_tokens: Most tokens that may wait for the device; a request beyond it is refused with
            `QueueFullError` at once. None is no limit.
        normalize: Put each score through a sigmoid. False, the default, gives the raw logit.
        query_instruction: Text put before each query as it is. None, the default, is the default prompt that
            sentence-transformers saved with the checkpoint, if there is one; "" is nothing.
        passage_instruction: Text put before each passage as it is; None is nothing.
        long_passages: `truncate` cuts a passage to the room the query leaves; `windows` scores
            overlapping windows of that size and takes the best.
        window_overlap_tokens: Tokens that neighbouring windows share; only for `long_passages="windows"`.
        blank_passages: What ranking does with a passage that has nothing to read: only white space, control
            and format characters, or nothing that the tokenizer has a token for. `last` ranks it after all
            others without scoring it, with `RankedPassage.blank` set; `refuse` raises `InputError`. The
            passage instruction does not count as text.

    Raises:
        ConfigError: A value is of the wrong type, out of range or contradicts another.

    Example:
        >>> ScorerConfig(model="BAAI/bge-reranker-large", query_max_length=256).effective_query_max_length
        256
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    sha256: str | None = None
    cache_folder: str | None = None
    local_files_only: bool = False
    device: str = "auto"
    devices: tuple[str, ...] | None = None
    dtype: DType = "auto"
    max_length: int = 512
    query_max_length: int | None = None
    query_truncation_side: TruncationSide = "right"
    max_batch_tokens: int | None = None
    num_threads: int | None = None
    max_wait_ms: float = 0.0
    max_queued_tokens: int | None = None
    normalize: bool = False
    query_instruction: str | None = None
    passage_instruction: str | None = None
    long_passages: LongPassages = "truncate"
    window_overlap_tokens: int = DEFAULT_WINDOW_OVERLAP
    blank_passages: BlankPassages = "last"

    def __post_init__(self) -> None:
        for name in ("model", "cache_folder"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        if isinstance(self.devices, Sequence) and not isinstance(self.devices, str):
            object.__setattr__(self, "devices", tuple(self.devices))
        self._check_types()
        self._check_model()
        self._check_device()
        self._check_lengths()

    @property
    def effective_query_max_length(self) -> int:
        """Longest query in tokens, with the default of three quarters of `max_length` filled in."""
        if self.query_max_length is not None:
            return self.query_max_length
        return self.max_length * 3 // 4

    def per_device(self) -> list[ScorerConfig]:
        """Return these settings once for each device, as those of a scorer on that device alone."""
        if self.devices is None:
            return [self]
        return [dataclasses.replace(self, device=device, devices=None) for device in self.devices]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScorerConfig:
        """Build a config from a mapping, such as parsed JSON.

        Raises:
            ConfigError: A key is unknown or a value is not valid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting(s) {unknown}; known are {known}")
        return cls(**data)

    def to_dict(self) -> dict[str, str | float | bool | list[str] | None]:
        """Return the settings as a dict that JSON can hold; `from_dict` takes it back unchanged."""
        devices = None if self.devices is None else list(self.devices)
        return {**dataclasses.asdict(self), "devices": devices}

    def _check_types(self) -> None:
        for name in ("model", "device"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name} must be a non-empty string")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            raise ConfigError("sha256 must be 64 lower-case hexadecimal digits or None")
        for name in ("revision", "cache_folder", "query_instruction", "passage_instruction"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string or None")
        for name in ("local_files_only", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False")
        for name, choices in (
            ("dtype", get_args(DType)),
            ("query_truncation_side", get_args(TruncationSide)),
            ("long_passages", get_args(LongPassages)),
            ("blank_passages", get_args(BlankPassages)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {list(choices)}")
        for name in ("query_max_length", "max_batch_tokens", "num_threads", "max_queued_tokens"):
            if getattr(self, name) is not None:
                self._check_integer(name, minimum=1)
        self._check_integer("max_length", minimum=NUM_SPECIAL_TOKENS + 2)
        self._check_integer("window_overlap_tokens", minimum=0)

        if not isinstance(self.max_wait_ms, int | float) or not 0 <= self.max_wait_ms <= 60_000:
            raise ConfigError("max_wait_ms must be a number from 0 to 60,000")

    def _check_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name} must be an integer of at least {minimum}")

    def _check_device(self) -> None:
        if self.devices is not None:
            self._check_devices(self.devices)
        for device in self.devices or (self.device,):
            if not _DEVICE.fullmatch(device):
                raise ConfigError("device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
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
            raise ConfigError("devices must name at least one device, and each by its own name, not 'auto'")
        if len({device.partition(":")[0] for device in devices}) > 1:
            raise ConfigError("devices must be of one kind, so that scores do not depend on which is idle")
        # 'cuda' is the first CUDA device, and 'cpu:N' the only CPU.
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
                f"max_length {self.max_length} ({NUM_SPECIAL_TOKENS} tokens are special); it can be at "
                f"most {self.max_length - NUM_SPECIAL_TOKENS - 1}"
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
    "dtype 'float16' is not supported on a CPU; use 'float32', or 'bfloat16' where the CPU has it, or "
    "a CUDA device"
)
INT8_OFF_CPU: Final = "dtype 'int8' runs on CPUs alone; use 'float16', or device='cpu'"
FLOAT8_NEEDS: Final = (
    "dtype 'float8' needs a CUDA device with arithmetic for it, such as Hopper's (capability 8.9 and later)"
)
