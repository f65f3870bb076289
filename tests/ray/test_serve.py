"""The Ray Serve application, over HTTP and over handles."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("ray", reason="needs the extra `ray`")

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

from bge_rerank_integrations import (
    AuthenticationError,
    BGEReranker,
    BGERerankPostprocessor,
    DeviceLostError,
    RemoteScorer,
    Scorer,
    ScorerConfig,
)
from bge_rerank_integrations.errors import ConfigError, InputTypeError, RemoteError, RequestTimeoutError
from bge_rerank_integrations.ray import ServeArguments, ServeScorer, app
from bge_rerank_integrations.ray.replica import RerankReplica
from tests.support.adapters import ADAPTER_TYPES, Ranked, arank_with, rank_with
from tests.support.tolerances import LOGIT_TOLERANCE

torch = pytest.importorskip("torch")
TOLERANCE = LOGIT_TOLERANCE[torch.float32]
KEY = "KEY-CANARY-1234"
QUERY = "what does a panda eat?"
CONFIG_FILE = Path(__file__).parents[2] / "examples" / "serve_config.yaml"
# Few enough that a test can exceed it.
MAX_REQUESTS = 8


@pytest.fixture(scope="module")
def url(cluster: None) -> Iterator[str]:
    """Start Serve's HTTP proxy, and return its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port}, logging_config={"log_level": "WARNING"})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def handle(url: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> DeploymentHandle[Any]:
    """Deploy two replicas of the small checkpoint, and return their handle."""
    key_file = tmp_path_factory.mktemp("key") / "key"
    key_file.write_text(KEY)
    arguments = ServeArguments(
        num_replicas=2,
        num_cpus=0.5,
        api_key_file=str(key_file),
        max_ongoing_requests=MAX_REQUESTS,
        model=str(checkpoint),
        device="cpu",
    )
    deployed: DeploymentHandle[Any] = serve.run(app(arguments), name="rerank")
    return deployed


@pytest.fixture(params=["serve", "remote"])
def connect(
    request: pytest.FixtureRequest, handle: DeploymentHandle[Any], url: str
) -> Callable[[], ServeScorer | RemoteScorer]:
    """Return a function that makes a scorer of the replicas, over the handle or over HTTP."""
    if request.param == "serve":
        return lambda: ServeScorer(handle)
    return lambda: RemoteScorer(url, api_key=KEY)


def test_both_adapters_give_the_order_of_the_local_scorer(
    connect: Callable[[], Any], scorer: Scorer, texts: list[str]
) -> None:
    async def arank(kind: Any, **options: Any) -> list[Ranked]:
        clustered = connect()
        ranked = await arank_with(kind(scorer=clustered, **options), texts)
        if isinstance(clustered, RemoteScorer):
            await clustered.aclose()
        return ranked

    clustered = connect()
    for kind in ADAPTER_TYPES:
        for normalize in (False, True):
            options: dict[str, Any] = {"top_n": 5, "normalize": normalize, "timeout": 30}
            expected = rank_with(kind(scorer=scorer, **options), texts)
            for ranked in (
                rank_with(kind(scorer=clustered, **options), texts),
                asyncio.run(arank(kind, **options)),
            ):
                assert [index for index, _ in ranked] == [index for index, _ in expected]
                assert [score for _, score in ranked] == pytest.approx(
                    [score for _, score in expected], abs=TOLERANCE
                )
    if isinstance(clustered, RemoteScorer):
        clustered.close()


def test_the_calls_are_those_of_the_local_scorer(handle: Any, scorer: Scorer, texts: list[str]) -> None:
    clustered = ServeScorer(handle)
    passages = [*texts, " "]
    expected = scorer.rank(QUERY, passages, threshold=-1.0)
    found = clustered.rank(QUERY, passages, threshold=-1.0)
    assert [(each.index, each.blank) for each in found] == [(each.index, each.blank) for each in expected]
    assert vars(found) == vars(expected)
    many = clustered.rank_many([(QUERY, passages), ("tea", []), ("tea", texts[:3])], top_n=2)
    assert [[each.index for each in ranking] for ranking in many] == [
        [each.index for each in scorer.rank(query, part, 2)]
        for query, part in [(QUERY, passages), ("tea", []), ("tea", texts[:3])]
    ]
    pairs = [(QUERY, text) for text in passages]
    for scores in (
        clustered.score(pairs),
        clustered.score(iter(pairs)),
        asyncio.run(clustered.ascore(pairs)),
    ):
        assert scores == pytest.approx(scorer.score(pairs), abs=TOLERANCE)
    normalized = ServeScorer(handle, normalize=True)
    assert all(0 <= score <= 1 for score in normalized.score(pairs))


def test_a_long_list_takes_several_calls(handle: Any, scorer: Scorer) -> None:
    passages = [f"panda {number % 50}" for number in range(1500)]
    found, expected = ServeScorer(handle).rank(QUERY, passages), scorer.rank(QUERY, passages)
    assert sorted(each.index for each in found) == list(range(1500))
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=TOLERANCE)


def test_wrong_input_is_refused_before_it_is_sent(handle: Any) -> None:
    with pytest.raises(InputTypeError, match="passage 1") as caught:
        ServeScorer(handle).rank(QUERY, ["a", None])  # type: ignore[list-item]
    assert caught.value.index == 1


def test_a_call_ends_with_its_timeout(handle: Any) -> None:
    passages = [f"panda {number} " * 100 for number in range(1000)]
    with pytest.raises(RequestTimeoutError):
        ServeScorer(handle).rank(QUERY, passages, timeout=0.05)
    with pytest.raises(RequestTimeoutError):
        asyncio.run(ServeScorer(handle).arank(QUERY, passages, timeout=0.05))


def test_a_pickled_scorer_works_in_another_process(handle: Any, scorer: Scorer, texts: list[str]) -> None:
    @ray.remote(num_cpus=0)
    def rank(pickled: bytes) -> list[int]:
        return [passage.index for passage in pickle.loads(pickled).rank(QUERY, texts, 3)]

    expected = [passage.index for passage in scorer.rank(QUERY, texts, 3)]
    assert ray.get(rank.remote(pickle.dumps(ServeScorer(handle)))) == expected


def test_the_key_is_needed(handle: Any, url: str) -> None:
    with RemoteScorer(url, api_key="wrong") as remote, pytest.raises(AuthenticationError):
        remote.rank(QUERY, ["a"])
    assert httpx.get(f"{url}/health").status_code == 200


def test_too_many_requests_are_refused_in_json(handle: Any, url: str) -> None:
    body = {"query": QUERY, "documents": [f"panda {number} " * 20 for number in range(300)]}

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/rerank", json=body, headers={"authorization": KEY}, timeout=60)

    with ThreadPoolExecutor(8 * MAX_REQUESTS) as pool:
        responses = list(pool.map(post, range(8 * MAX_REQUESTS)))
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) < len(responses)
    for response in refused:
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["type"] == "QueueFullError"


def test_a_dead_replica_loses_no_request(handle: Any, url: str, scorer: Scorer, texts: list[str]) -> None:
    expected = [passage.index for passage in scorer.rank(QUERY, texts)]
    clients: list[Any] = [
        ServeScorer(handle, max_retries=9),
        RemoteScorer(url, api_key=KEY, max_retries=9),
    ]
    replica = next(
        actor for actor in ray.util.list_named_actors(all_namespaces=True) if "Reranker#" in actor["name"]
    )
    with clients[1], ThreadPoolExecutor(MAX_REQUESTS) as pool:
        ranking = [pool.submit(clients[number % 2].rank, QUERY, texts) for number in range(60)]
        ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))
        for future in ranking:
            assert [passage.index for passage in future.result()] == expected


def test_a_lost_device_makes_the_replica_unhealthy() -> None:
    for is_live in (True, False):
        replica: Any = SimpleNamespace(_service=SimpleNamespace(is_live=is_live))
        health = RerankReplica.check_health(replica)
        if is_live:
            asyncio.run(health)
        else:
            with pytest.raises(DeviceLostError):
                asyncio.run(health)


def test_the_arguments_of_serve_run_are_strings() -> None:
    given = {"model": "embedded", "num_replicas": "2", "max_length": "256", "local_files_only": "true"}
    assert isinstance(app, FunctionType)
    application = call_user_app_builder_with_args_if_necessary(app, given)
    deployment = application._bound_deployment
    assert deployment.num_replicas == 2
    config = deployment.init_args[0]
    assert (config.model, config.max_length, config.local_files_only) == ("embedded", 256, True)
    assert config.num_threads == 1
    assert config.max_queued_tokens == 1_000_000
    assert not config.normalize
    several = ServeArguments.model_validate({"model": "embedded", "devices": "cuda:0,cuda:1"})
    assert several.scorer_config().devices == ("cuda:0", "cuda:1")


def test_autoscaling_and_resources() -> None:
    arguments = ServeArguments(
        model="embedded", max_replicas=8, num_gpus=1, num_cpus=4, max_ongoing_requests=100, grace_s=5
    )
    deployment = app(arguments)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 8, 64)
    assert (deployment.ray_actor_options or {})["num_gpus"] == 1
    assert deployment.max_ongoing_requests > 100
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 5
    assert deployment._deployment_config.max_surge_percent == 100, "new replicas start first"
    assert deployment.init_args[0].num_threads == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modle": "embedded"}, "modle"),
        ({"normalize": True}, "normalize"),
        ({"max_length": "long"}, "max_length"),
        ({"max_length": 3}, "max_length must be an integer from"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": 2, "max_replicas": 3}, "cannot both be given"),
        ({"min_replicas": 4}, "min_replicas can only be used with max_replicas"),
        ({"target_ongoing_requests": 4}, "target_ongoing_requests can only be used with max_replicas"),
        ({"min_replicas": 4, "max_replicas": 3}, "min_replicas must be at most max_replicas"),
        ({"timeout_s": "nan"}, "timeout_s"),
        ({"max_surge_percent": 101}, "max_surge_percent"),
        ({"max_surge_percent": -1}, "max_surge_percent"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        ServeArguments(**arguments)


def test_every_setting_is_an_argument() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ScorerConfig)}
    del fields["normalize"]
    defaults = ScorerConfig()
    for name in fields:
        default = ServeArguments.model_fields[name].default
        expected = 1_000_000 if name == "max_queued_tokens" else getattr(defaults, name)
        assert default == expected, name


def test_the_config_file_of_the_examples() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8")))
    (application,) = config.applications
    assert application.import_path == f"{app.__module__.removesuffix('.serve')}:{app.__name__}"
    assert ServeArguments.model_validate(application.args).max_replicas == 2


def test_an_adapter_names_the_scorer_without_an_address(handle: Any) -> None:
    scorer = ServeScorer(handle)
    for adapter in (BGEReranker(scorer=scorer), BGERerankPostprocessor(scorer=scorer)):
        assert "ServeScorer" in repr(adapter)
        assert adapter.model_copy(deep=True).scorer is scorer


class NoReranker:
    """An application of somebody else."""

    def __call__(self, request: Any) -> str:
        return "hello"


@pytest.mark.usefixtures("url")
def test_a_handle_of_another_application_is_refused_at_once() -> None:
    other: Any = serve.deployment(NoReranker)
    scorer = ServeScorer(serve.run(other.bind(), name="other", route_prefix="/other"), max_retries=1000)
    try:
        with pytest.raises(RemoteError, match="the application does not rank"):
            scorer.rank(QUERY, ["a"])
        with pytest.raises(RemoteError, match="the application does not rank"):
            asyncio.run(scorer.arank(QUERY, ["a"]))
    finally:
        serve.delete("other")
