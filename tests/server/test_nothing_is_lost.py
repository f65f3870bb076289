"""Many clients of all kinds at the same time: every request ends in exactly one correct way."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import httpx

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.server import ServerSettings, create_app
from tests.server.conftest import KEY
from tests.support.servers import running
from tests.support.tolerances import LOGIT_TOLERANCE

NUM_CLIENTS = 16
NUM_REQUESTS = 400


async def test_every_request_ends_right(local: Scorer, texts: list[str]) -> None:
    logits = {text: passage.score for text in texts for passage in local.rank("panda", [text])}
    tolerance = max(LOGIT_TOLERANCE.values())
    ends: Counter[Any] = Counter()
    app = create_app(local, ServerSettings(api_key=KEY, max_body_mib=0.05))
    right = {"authorization": KEY}

    async def ranked(client: httpx.AsyncClient, passages: list[str]) -> None:
        body = {"query": "panda", "texts": passages, "raw_scores": True}
        response = await client.post("/rerank", json=body, headers=right)
        answer = response.json()
        assert response.status_code == 200
        assert sorted(each["index"] for each in answer) == list(range(len(passages)))
        for each in answer:
            assert abs(each["score"] - logits[passages[each["index"]]]) <= tolerance
        ends["ranked"] += 1

    async def refused(client: httpx.AsyncClient, content: str, headers: dict[str, str], status: int) -> None:
        response = await client.post("/v1/rerank", content=content, headers=headers)
        assert (response.status_code, response.json()["message"] != "") == (status, True)
        ends[status] += 1

    async def gone(client: httpx.AsyncClient, passages: list[str]) -> None:
        try:
            body = {"query": "panda", "texts": passages}
            await client.post("/rerank", json=body, headers=right, timeout=0.001)
        except httpx.TimeoutException:
            ends["gone"] += 1
        else:
            ends["ranked"] += 1

    async def work(client: httpx.AsyncClient, seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(NUM_REQUESTS // NUM_CLIENTS):
            passages = choose.choices(texts, k=choose.randint(1, 8))
            body = json.dumps({"query": "panda", "documents": passages})
            kind = choose.choice(["right"] * 6 + ["malformed", "large", "stranger", "gone"])
            if kind == "right":
                await ranked(client, passages)
            elif kind == "malformed":
                await refused(client, body[:-1], right, 400)
            elif kind == "large":
                await refused(client, body + " " * 60_000, right, 413)
            elif kind == "stranger":
                await refused(client, body, {"authorization": "Bearer wrong"}, 401)
            else:
                await gone(client, passages)

    with running(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await asyncio.gather(*(work(client, seed) for seed in range(NUM_CLIENTS)))
            assert (await client.get("/health/ready")).json()["queued_tokens"] == 0
    assert sum(ends.values()) == NUM_REQUESTS
    assert min(ends[each] for each in ("ranked", 400, 401, 413)) > 0
