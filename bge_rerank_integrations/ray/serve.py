"""`app`: a Ray Serve application that answers rerank requests over HTTP and over handles."""

# This module has no `from __future__ import annotations`, because Ray Serve reads the annotation of `app`.

from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

from bge_rerank_integrations.errors import ConfigError, missing_extra

try:
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
    from ray import serve
except ImportError as error:
    raise missing_extra("ray", "ray[data,serve]") from error

from bge_rerank_integrations.config import ScorerConfig, Setting
from bge_rerank_integrations.ray.replica import RerankReplica
from bge_rerank_integrations.server.settings import ServerSettings

_NAME: Final = "Reranker"
# Each request chooses its scale, so the scorer returns raw logits.
_NOT_SETTINGS: Final = frozenset({"normalize"})
_MAX_QUEUED_TOKENS: Final = 1_000_000
# Ray Serve lets this many times the replica's own limit through, so that the replica refuses the rest with a
# JSON response. Ray Serve itself would answer in plain text.
_HEADROOM: Final = 2

_Count = Annotated[int, Field(ge=1)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeArguments(BaseModel):
    """Arguments of `app`. Every setting of `ScorerConfig` except `normalize` is an argument too.

    `serve run` passes all values as strings, and they are converted to the type of the setting.

    Attributes:
        num_replicas: Number of replicas. It cannot be combined with `max_replicas`.
        min_replicas: Smallest number of replicas with autoscaling.
        max_replicas: Largest number of replicas with autoscaling; None is no autoscaling.
        target_ongoing_requests: Number of requests of a replica that autoscaling aims for.
        num_cpus: Logical CPUs that each replica reserves. Unless `num_threads` is given, a replica uses as
            many threads as it reserves whole CPUs, and at least one.
        num_gpus: GPUs that each replica reserves. 1 gives each replica a GPU of its own.
        max_ongoing_requests: Maximum number of requests that a replica works on. It refuses more with status
            429. A high number lets the scorer fill its batches.
        api_key_file: File with the API key on the machines of the replicas; None takes it from the
            environment variable `BGE_RERANK_API_KEY` of the replicas.
        model_name: Name of the model in responses; None is the last part of `model`.
        max_body_mb: Largest request body in MiB, counted after decompression.
        timeout_s: Maximum time in seconds to receive a request, and again to score it.
        grace_s: Maximum time in seconds to finish accepted requests when a replica is stopped.

    Example:
        >>> ServeArguments(model="embedded", num_replicas=2).num_replicas
        2
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    num_replicas: _Count | None = None
    min_replicas: _Count = 1
    max_replicas: _Count | None = None
    target_ongoing_requests: _Seconds = 64
    num_cpus: _Amount = 1
    num_gpus: _Amount = 0
    max_ongoing_requests: _Count = 256
    api_key_file: str | None = None
    model_name: str | None = None
    max_body_mb: _Seconds = 32
    timeout_s: _Seconds = 60
    grace_s: _Seconds = 30

    @model_validator(mode="after")
    def _check(self) -> "ServeArguments":
        if self.max_replicas is not None:
            if self.num_replicas is not None:
                raise ValueError("num_replicas and max_replicas cannot both be given")
            if self.min_replicas > self.max_replicas:
                raise ValueError("min_replicas must be at most max_replicas")
        self.scorer_config()
        return self

    def scorer_config(self) -> ScorerConfig:
        """Return the settings of the scorers.

        Raises:
            ConfigError: A setting is unknown or invalid.
        """
        given = _converted(self.model_extra or {})
        settings = {
            "max_queued_tokens": _MAX_QUEUED_TOKENS,
            # Ray limits OpenMP to the whole CPUs that a replica reserves, and to 1 for a fraction of a CPU.
            "num_threads": max(int(self.num_cpus), 1),
            **{name: value for name, value in given.items() if value is not None},
        }
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
    settings = {name: getattr(args, name) for name in ("model_name", "max_body_mb", "timeout_s")}
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
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=args.grace_s,
        **scaling,
    )(RerankReplica)
    application: serve.Application = deployment.bind(
        args.scorer_config(), args.api_key_file, settings, args.max_ongoing_requests
    )
    return application


def _converted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `ScorerConfig` with strings converted to the types of the settings."""
    hints = get_type_hints(ScorerConfig)
    known = sorted(set(hints) - _NOT_SETTINGS)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown argument(s) {unknown}; the arguments are {sorted(ServeArguments.model_fields)} and the "
            f"settings of ScorerConfig, {known}"
        )
    values = {}
    for name, value in given.items():
        hint = hints[name]
        try:
            values[name] = TypeAdapter(
                get_args(hint)[1] if get_origin(hint) is Setting else hint
            ).validate_python(value)
        except ValidationError:
            raise ConfigError(f"{name} has the wrong type") from None
    return values
