"""`app`: a Ray Serve application that answers rerank requests over HTTP and over handles."""

# This module has no `from __future__ import annotations`, because Ray Serve reads the annotation of `app`.

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any, Final

from bge_rerank_integrations.errors import missing_extra

try:
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
    from ray import serve
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import (
    DEFAULT_MODEL,
    DEFAULT_WINDOW_OVERLAP,
    BlankPassages,
    DType,
    LongPassages,
    ScorerConfig,
    TruncationSide,
)
from bge_rerank_integrations.ray.replica import RerankReplica
from bge_rerank_integrations.server.settings import DEFAULT_GRACE_S, DEFAULT_MAX_QUEUED_TOKENS, ServerSettings

_NAME: Final = "Reranker"
_SETTINGS: Final = tuple(
    field.name for field in dataclasses.fields(ScorerConfig) if field.name != "normalize"
)
# Ray Serve lets this many times the replica's own limit through, so that the replica refuses the rest with a
# JSON response. Ray Serve itself would answer in plain text.
_HEADROOM: Final = 2

_Count = Annotated[int, Field(ge=1)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Percent = Annotated[int, Field(ge=0, le=100)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# `serve run` passes strings, such as `devices=cuda:0,cuda:1`.
_Names = Annotated[
    Sequence[str], BeforeValidator(lambda names: names.split(",") if isinstance(names, str) else names)
]


class ServeArguments(BaseModel):
    """Arguments of `app`: how to run the replicas, and the settings of `ScorerConfig` except `normalize`.

    Each request chooses its scale, so there is no `normalize`. The settings that are not described here are
    those of `ScorerConfig`. Strings, as `serve run` passes them, are converted.

    Attributes:
        num_replicas: Number of replicas. It cannot be combined with `max_replicas`.
        min_replicas: Smallest number of replicas with autoscaling.
        max_replicas: Largest number of replicas with autoscaling; None means no autoscaling.
        target_ongoing_requests: Number of requests of a replica that autoscaling aims for.
        num_cpus: Logical CPUs that each replica reserves. Unless `num_threads` is given, a replica uses as
            many threads as it reserves whole CPUs, and at least one.
        num_gpus: GPUs that each replica reserves. 1 reserves one GPU for each replica.
        max_ongoing_requests: Maximum number of requests that a replica works on. It refuses more with status
            429. A high number lets the scorer fill its batches.
        api_key_file: File with the API key on the machines of the replicas; None takes it from the
            environment variable `BGE_RERANK_API_KEY` of the replicas.
        model_name: Name of the model in responses; None means the last part of `model`.
        max_body_mib: Largest request body in MiB, counted after decompression.
        timeout_s: Maximum time in seconds to receive a request. The same limit applies to scoring it.
        grace_s: Maximum time in seconds to finish accepted requests when a replica is stopped.
        max_surge_percent: Extra replicas during an update, as a percentage of the replicas. With the default,
            old replicas stop only when new ones have loaded the model. The cluster needs room for at least
            one more replica. 0 stops old replicas first.
        max_queued_tokens: Maximum number of tokens in the queue of a replica. It refuses requests beyond it
            with status 429.
        num_threads: Number of CPU threads of a replica; None means the whole CPUs in `num_cpus`, and
            at least 1.

    Raises:
        pydantic.ValidationError: An argument is unknown, has the wrong type or is out of range.

    Example:
        >>> ServeArguments(model="embedded", num_replicas=2).num_replicas
        2
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    num_replicas: _Count | None = None
    min_replicas: _Count = 1
    max_replicas: _Count | None = None
    target_ongoing_requests: _Positive = 64
    num_cpus: _Amount = 1
    num_gpus: _Amount = 0
    max_ongoing_requests: _Count = 256
    api_key_file: str | None = None
    model_name: str | None = None
    max_body_mib: _Positive = ServerSettings.max_body_mib
    timeout_s: _Positive = ServerSettings.timeout_s
    grace_s: _Positive = DEFAULT_GRACE_S
    max_surge_percent: _Percent = 100

    model: str | os.PathLike[str] = DEFAULT_MODEL
    revision: str | None = None
    sha256: str | None = None
    cache_folder: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    device: str = "auto"
    devices: _Names | None = None
    dtype: DType = "auto"
    max_length: int = 512
    query_max_length: int | None = None
    query_truncation_side: TruncationSide = "right"
    max_batch_tokens: int | None = None
    num_threads: int | None = None
    max_wait_ms: float = 0.0
    max_queued_tokens: int = DEFAULT_MAX_QUEUED_TOKENS
    query_instruction: str | None = None
    passage_instruction: str | None = None
    long_passages: LongPassages = "truncate"
    window_overlap_tokens: int = DEFAULT_WINDOW_OVERLAP
    blank_passages: BlankPassages = "last"
    capture_graphs: bool = True

    @model_validator(mode="after")
    def _check(self) -> "ServeArguments":
        if self.max_replicas is not None:
            if self.num_replicas is not None:
                raise ValueError("num_replicas and max_replicas cannot both be given")
            if self.min_replicas > self.max_replicas:
                raise ValueError("min_replicas must be at most max_replicas")
        elif ignored := sorted({"min_replicas", "target_ongoing_requests"} & self.model_fields_set):
            raise ValueError(f"{' and '.join(ignored)} can only be used with max_replicas")
        self.scorer_config()
        return self

    def scorer_config(self) -> ScorerConfig:
        """Return the settings of the scorers.

        Raises:
            ConfigError: A setting is invalid.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        if self.num_threads is None:
            # Ray limits OpenMP to the whole CPUs that a replica reserves, and to 1 for a fraction of a CPU.
            settings["num_threads"] = max(int(self.num_cpus), 1)
        return ScorerConfig.from_dict(settings)


def app(args: ServeArguments) -> serve.Application:
    """Build the Serve application.

    The application has the HTTP interface of `bge-rerank serve`. `ServeScorer` calls it over a handle.

    Args:
        args: The arguments. `serve run` and the field `args` of a config file give them.

    Returns:
        The application, for `serve.run`.

    Example:
        >>> serve.run(app(ServeArguments(model="embedded", num_replicas=2)))
    """
    settings = {name: getattr(args, name) for name in ("model_name", "max_body_mib", "timeout_s")}
    ServerSettings(**settings)  # raises for an invalid setting before a replica starts
    scaling: dict[str, Any] = {"num_replicas": args.num_replicas or 1}
    if args.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
            }
        }
    deployment = serve.deployment(
        name=_NAME,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=_HEADROOM * args.max_ongoing_requests,
        max_surge_percent=args.max_surge_percent,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=args.grace_s,
        **scaling,
    )(RerankReplica)
    application: serve.Application = deployment.bind(
        args.scorer_config(), args.api_key_file, settings, args.max_ongoing_requests
    )
    return application
