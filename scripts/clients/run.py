"""Checks that real clients of other rerank services work with `bge-rerank serve`.

Starts the command with the embedded model, and lets each client rank the same passages: the order must be the
local scorer's. Then each client meets a wrong key, a full queue and a body that is too large, and must raise
an error that says so.

Usage: python -m scripts.clients.run FOLDER

FOLDER holds one virtual environment for each entry of `ENVIRONMENTS`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.server import ServerSettings, create_app
from tests.support.servers import HeldScorer, running, wait_until

KEY = "the-right-key"
QUERY = "what does a giant panda eat?"
TOPICS = [
    "pandas",
    "bamboo",
    "tea",
    "cars",
    "houses",
    "bears",
    "fish",
    "honey",
    "python",
    "rivers",
    "books",
    "stars",
    "rain",
    "snow",
    "bread",
    "wine",
    "cats",
    "dogs",
    "birds",
    "trees",
]
DOCUMENTS = [f"document number {number} is about {topic}" for number, topic in enumerate(TOPICS)]

ENVIRONMENTS = {
    "many": [
        "langchain_cohere",
        "langchain_nvidia",
        "langchain_voyageai",
        "llama_index_tei",
        "llama_index_jinaai",
        "llama_index_nvidia",
        "litellm_cohere",
        "litellm_jina_ai",
        "litellm_hosted_vllm",
        "litellm_huggingface",
        "litellm_infinity",
        "litellm_voyage",
        "rerankers_cohere",
        "rerankers_jina",
        "rerankers_voyage",
        "rerankers_tei",
        "haystack_tei",
    ],
    "cohere": ["cohere_v1", "cohere_v2"],
}
# These read the body of an error as if it were an answer, so that all they can do is raise.
IGNORE_THE_STATUS = {
    "llama_index_tei",
    "rerankers_cohere",
    "rerankers_jina",
    "rerankers_voyage",
    "rerankers_tei",
}
# What an error must hold, one of each: the status, or the message of the server.
EXPECTED = {
    "a wrong key": r"401|API key is missing or wrong",
    "a full queue": r"429|tokens are waiting",
    "a body that is too large": r"413|larger than",
}


def main() -> int:
    folder = Path(sys.argv[1])
    failures: list[str] = []
    with Scorer("embedded", device="cpu") as scorer:
        order = [passage.index for passage in scorer.rank(QUERY, DOCUMENTS)]
    with serve_command() as url:
        for client, outcome in call_all(folder, url, KEY, DOCUMENTS):
            is_right = outcome.get("order") == order
            report(failures, client, "ranks as the local scorer does", is_right, outcome)
        check_refusals(failures, "a wrong key", call_all(folder, url, "wrong", DOCUMENTS))
    with full_server() as url:
        check_refusals(failures, "a full queue", call_all(folder, url, KEY, DOCUMENTS))
    settings = ServerSettings(api_key=KEY, max_body_mib=0.001)
    with running(create_app(HeldScorer(is_held=False), settings)) as url:  # type: ignore[arg-type]
        large = [document * 20 for document in DOCUMENTS]
        check_refusals(failures, "a body that is too large", call_all(folder, url, KEY, large))
    print(f"{len(failures)} failed" if failures else "All clients passed.")
    return 1 if failures else 0


def check_refusals(failures: list[str], what: str, outcomes: Iterator[tuple[str, dict[str, Any]]]) -> None:
    for client, outcome in outcomes:
        error = outcome.get("error", "")
        is_right = bool(error) and (client in IGNORE_THE_STATUS or bool(re.search(EXPECTED[what], error)))
        report(failures, client, f"tells of {what}", is_right, outcome)


def report(failures: list[str], client: str, what: str, is_right: bool, outcome: dict[str, Any]) -> None:
    print(f"{'ok    ' if is_right else 'FAILED'} {client} {what}", flush=True)
    if not is_right:
        failures.append(f"{client} {what}")
        print(json.dumps(outcome, indent=1)[:3000], flush=True)


def call_all(folder: Path, url: str, key: str, documents: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Let every client of every environment rank, and yield its name and what came of it."""
    asked = json.dumps({"url": url, "key": key, "query": QUERY, "documents": documents})
    script = Path(__file__).with_name("calls.py")
    for environment, clients in ENVIRONMENTS.items():
        python = folder / environment / "bin" / "python"
        process = subprocess.run(
            [python, script, *clients], input=asked, capture_output=True, text=True, timeout=300, check=False
        )
        outcomes = {line["client"]: line for line in map(json.loads, process.stdout.splitlines())}
        missing = {"error": "no outcome", "traceback": process.stderr[-2000:]}
        for client in clients:
            yield client, outcomes.get(client, missing if process.returncode else {})


@contextmanager
def serve_command() -> Iterator[str]:
    """Run `bge-rerank serve` with the embedded model, and give its URL once it is ready."""
    command = [sys.executable, "-m", "bge_rerank_integrations.cli", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", "embedded", "--device", "cpu"],
        env={**os.environ, "BGE_RERANK_API_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the server ended before it listened"
            found = re.search(r"Listening on (http://\S+),", line)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(process.stderr.read)  # so that a full pipe does not stop the server
            deadline = time.monotonic() + 300
            while httpx.get(found[1] + "/health/ready").status_code != 200:
                assert time.monotonic() < deadline, "the server is not ready after five minutes"
                time.sleep(0.1)
            yield found[1]
            process.terminate()
            assert process.wait(60) == 0, "the server did not end well"
    finally:
        process.kill()
        process.wait()


@contextmanager
def full_server() -> Iterator[str]:
    """Run a server whose queue is full."""
    held = HeldScorer(max_queued_tokens=100)
    with (
        running(create_app(held, ServerSettings(api_key=KEY, timeout_s=600))) as url,  # type: ignore[arg-type]
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(
            httpx.post,
            url + "/rerank",
            json={"query": "q", "texts": ["word " * 100]},
            headers={"authorization": KEY},
            timeout=600,
        )
        wait_until(lambda: held.num_calls == 1)
        yield url
        held.is_held = False
        assert first.result().status_code == 200


if __name__ == "__main__":
    sys.exit(main())
