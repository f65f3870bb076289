"""A web application that many people write: `CrossEncoder`, a lock, and one route.

    python -m benchmarks.peers.plain_app MODEL DEVICE PORT

The route is a plain function, so that each request has a thread. The lock keeps two requests from computing
at the same time, since `CrossEncoder` does not batch across calls.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import uvicorn
from sentence_transformers import CrossEncoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def create_app(model: str, device: str) -> Starlette:
    """Return the application, which answers `POST /rerank` and `GET /health`."""
    encoder = CrossEncoder(model, device=device)
    lock = threading.Lock()

    def predict(query: str, documents: list[str]) -> list[dict[str, Any]]:
        with lock:
            scores = encoder.predict([(query, document) for document in documents])
        results = [{"index": index, "relevance_score": float(score)} for index, score in enumerate(scores)]
        return sorted(results, key=lambda result: -result["relevance_score"])

    async def rerank(request: Request) -> Response:
        body = await request.json()
        return JSONResponse({"results": await run_in_threadpool(predict, body["query"], body["documents"])})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/rerank", rerank, methods=["POST"]), Route("/health", health)])


if __name__ == "__main__":
    model, device, port = sys.argv[1:]
    uvicorn.run(create_app(model, device), host="127.0.0.1", port=int(port), log_level="warning")
