"""Checkpoints from a hub. The hub library downloads them from a server on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bge_rerank_integrations import Scorer
from tests.support.hub import COMMIT, Hub, running_hub
from tests.support.queues import PATIENCE_S, wait_until

PAIRS = [["what does a panda eat?", "The giant panda eats bamboo."], ["a", "b"]]

# In a child process, because the hub library reads its environment variables when it is imported.
FIND = """
    import json, sys
    from bge_rerank_integrations import ScorerConfig
    from bge_rerank_integrations.engine.checkpoint.locate import find_checkpoint
    from bge_rerank_integrations.errors import RerankError

    for config in json.loads(sys.argv[1]):
        try:
            print(json.dumps(["found", str(find_checkpoint(ScorerConfig(**config)))]))
        except RerankError as error:
            print(json.dumps([type(error).__name__, str(error)]))
"""
SCORE = """
    import json, sys
    from bge_rerank_integrations import Scorer

    with Scorer("team/reranker", device="cpu", dtype="float32") as scorer:
        print(json.dumps(scorer.score([tuple(pair) for pair in json.loads(sys.argv[1])])))
"""


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    """Return a hub with one repository, which also has files that are not needed."""
    folder = tmp_path / "repository"
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text("A model.")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "model.fp16.safetensors").write_bytes(b"other weights")
    with running_hub({"team/reranker": folder}) as hub:
        yield hub


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """Return an environment in which the hub library uses the hub."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("HF_") or name.lower().endswith("_proxy"))
    }
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}


def start_child(code: str, hub: Hub, home: Path, argument: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(argument)],
        env={**environment_of(hub, home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_child(code: str, hub: Hub, home: Path, argument: Any, **environment: str) -> list[Any]:
    """Run code with the hub, and return the JSON lines that it prints."""
    child = start_child(code, hub, home, argument, **environment)
    stdout, stderr = child.communicate(timeout=300)
    assert child.returncode == 0, stderr
    return [json.loads(line) for line in stdout.splitlines()]


def run_cli(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bge_rerank_integrations.cli", *arguments, "--device", "cpu"],
        env=environment_of(hub, home),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def find(hub: Hub, home: Path, *configs: dict[str, Any], **environment: str) -> list[Any]:
    """Find models in a child process, and return the kind and the text of each result."""
    given = [{"model": "team/reranker", **config} for config in configs]
    return run_child(FIND, hub, home, given, **environment)


def test_a_model_is_downloaded_once_and_scores_like_the_original(
    hub: Hub, tmp_path: Path, scorer: Scorer
) -> None:
    expected = scorer.score([(query, passage) for query, passage in PAIRS])
    assert run_child(SCORE, hub, tmp_path, PAIRS) == [expected]
    assert sorted(hub.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    # Later, without a connection.
    assert run_child(SCORE, hub, tmp_path, PAIRS, HF_ENDPOINT="http://127.0.0.1:9") == [expected]
    assert run_child(SCORE, hub, tmp_path, PAIRS, HF_HUB_OFFLINE="1") == [expected]
    assert len(hub.downloads) == 3


def test_a_revision_and_a_cache_can_be_named(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    [[kind, folder]] = find(hub, tmp_path, {"revision": COMMIT, "cache_folder": str(cache)})
    assert kind == "found"
    assert Path(folder).is_relative_to(cache)
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(hub.downloads)


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    hub.refusals = {"team/gated": (403, "GatedRepo"), "team/down": (503, ""), "team/forbidden": (403, "")}
    missing, revision, gated, down, forbidden, local = find(
        hub,
        tmp_path,
        {"model": "team/missing"},
        {"revision": "v9"},
        {"model": "team/gated"},
        {"model": "team/down"},
        {"model": "team/forbidden"},
        {"local_files_only": True},
    )
    assert missing[0] == revision[0] == gated[0] == "CheckpointNotFoundError"
    assert "neither an existing local folder nor on the hub" in missing[1]
    assert revision[1] == "model 'team/reranker' is on the hub, but has no revision 'v9'"
    assert "accept its terms on the hub" in gated[1]
    assert down[0] == forbidden[0] == local[0] == "HubUnreachableError"
    assert "the hub could not be used (the hub answered with status 503). To work offline" in down[1]
    assert "the hub answered with status 403" in forbidden[1]
    assert "and local_files_only=True forbids a download. To work offline" in local[1]
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the environment variable HF_HUB_OFFLINE forbids a download. To work"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub could not be used (ConnectError: "),
        ({"HF_ENDPOINT": "nonsense"}, "could not be downloaded: UnsupportedProtocol: "),
        # The proxy is the hub, which does not know the method CONNECT.
        (
            {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": "{hub}"},
            "could not be downloaded: ProxyError",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached(
    hub: Hub, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    filled = {name: value.format(hub=hub.url) for name, value in environment.items()}
    [[kind, text]] = find(hub, tmp_path, {}, **filled)
    assert kind == "HubUnreachableError"
    assert message in text
    assert "`hf download team/reranker --local-dir reranker`" in text


def test_a_download_that_breaks_off_can_be_repeated(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = {"model.safetensors"}
    [[kind, text]] = find(hub, tmp_path, {})
    assert kind == "HubUnreachableError"
    assert "could not be downloaded: RemoteProtocolError: peer closed connection" in text
    assert "Try again." in text
    hub.cuts = set()
    [[kind, folder]] = find(hub, tmp_path, {})
    assert kind == "found"
    assert (Path(folder) / "model.safetensors").stat().st_size == (
        hub.repositories["team/reranker"] / "model.safetensors"
    ).stat().st_size


def test_ctrl_c_ends_a_download_soon(hub: Hub, tmp_path: Path) -> None:
    hub.stalls = {"model.safetensors"}
    child = start_child(FIND, hub, tmp_path, [{"model": "team/reranker"}])
    wait_until(lambda: "model.safetensors" in hub.downloads)
    child.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert child.stderr is not None
    assert any(line.startswith("KeyboardInterrupt") for line in child.stderr)
    assert time.monotonic() - started < PATIENCE_S / 4, "it did not wait for the download"
    hub.stalls = set()  # one half of the file is left
    child.communicate(timeout=PATIENCE_S)
    assert child.returncode == -signal.SIGINT
    assert find(hub, tmp_path, {})[0][0] == "found"


def test_credentials_of_a_proxy_are_not_shown(hub: Hub, tmp_path: Path) -> None:
    [[kind, text]] = find(hub, tmp_path, {}, HTTPS_PROXY="ht!tp://user:SECRET@host", HF_ENDPOINT="https://h")
    assert kind == "HubUnreachableError"
    assert "ht!tp://host" in text
    assert "SECRET" not in text
    for password in ("SECRET/x", "SECRET#x", "a@SECRET"):
        [[kind, text]] = find(
            hub, tmp_path, {}, HTTPS_PROXY=f"http://user:{password}@host:80", HF_ENDPOINT="https://h"
        )
        assert kind == "HubUnreachableError"
        assert "SECRET" not in text


def test_a_job_needs_no_model_in_the_cache_and_keeps_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "ranked.jsonl"
    request = json.dumps({"query": PAIRS[0][0], "passages": [passage for _, passage in PAIRS]})
    requests.write_text(f"{request}\nbroken\n{request}\n")
    command = ["rank", str(requests), "-o", str(output), "--model", "team/reranker"]
    stopped = run_cli(hub, tmp_path, *command, "--strict")
    assert stopped.returncode == 3, stopped.stderr
    assert "Fetching" not in stopped.stderr, "progress bars are for terminals"
    # Other weights come to the same branch.
    hub.commit = "f" * 40
    path = hub.repositories["team/reranker"] / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    refused = run_cli(hub, tmp_path, *command)
    assert refused.returncode == 1
    assert "other settings (checkpoint)" in " ".join(refused.stderr.split())
    resumed = run_cli(hub, tmp_path, *command, "--revision", COMMIT)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert first["results"] == second["results"]


def test_a_job_whose_download_fails_leaves_no_files(hub: Hub, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"query": "a", "passages": ["b"]}\n')
    failed = run_cli(hub, tmp_path, "rank", str(requests), "-o", str(tmp_path / "out"), "--model", "team/no")
    assert failed.returncode == 1
    assert "nor on the hub" in " ".join(failed.stderr.split())
    assert "--local-files-only" not in failed.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [[kind, text]] = find(hub, tmp_path, {"cache_folder": str(tmp_path / "file" / "cache")})
    assert kind == "CheckpointError"
    assert "could not be downloaded: NotADirectoryError" in text
    assert "set cache_folder to a folder that can be written" in text
