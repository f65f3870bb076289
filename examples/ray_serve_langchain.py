"""A LangChain app on Ray Serve that reranks with replicas of the model, without HTTP between them.

    python -m examples.ray_serve_langchain "What do giant pandas eat?"

Serve runs two deployments: the replicas of the reranker, which need the CPUs or GPUs, and `Search`, which
holds the LangChain code. Both scale on their own.

Needs `pip install "bge-rerank-integrations[langchain,ray]"`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import ray
from langchain_core.documents import Document
from ray import serve
from ray.serve.handle import DeploymentHandle

from bge_rerank_integrations import BGEReranker
from bge_rerank_integrations.ray import ServeArguments, ServeScorer, app
from examples.random_checkpoint import read_texts


class Search:
    """Answers questions with the best documents.

    Args:
        reranker: A handle of the replicas.
        top_n: Number of documents to return.
    """

    def __init__(self, reranker: DeploymentHandle[Any], top_n: int) -> None:
        self._compressor = BGEReranker(scorer=ServeScorer(reranker), top_n=top_n, timeout=30)
        # A real app has a retriever here. The example corpus is small enough to rerank all of it.
        self._documents = [Document(page_content=text) for text in read_texts()]

    async def __call__(self, question: str) -> list[tuple[float, str]]:
        """Return the best documents with their scores."""
        ranked = await self._compressor.acompress_documents(self._documents, question)
        return [(document.metadata["relevance_score"], document.page_content) for document in ranked]


def build(arguments: ServeArguments, top_n: int) -> serve.Application:
    """Return the Serve application: `Search`, with the reranker as its dependency."""
    search = serve.deployment(name="Search", ray_actor_options={"num_cpus": 0.5})(Search)
    application: serve.Application = search.bind(app(arguments), top_n)
    return application


def main(argv: Sequence[str] | None = None) -> int:
    """Start the application on this machine, ask it a question and stop it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("question", nargs="?", default="What do giant pandas eat?")
    parser.add_argument("--model", default="embedded", help="checkpoint folder, hub id or `embedded`")
    parser.add_argument("--num-replicas", type=int, default=2, help="processes that load the model")
    parser.add_argument("--top-n", type=int, default=3, help="documents to return")
    args = parser.parse_args(argv)
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    arguments = ServeArguments(model=args.model, num_replicas=args.num_replicas, num_cpus=0.5)
    handle: DeploymentHandle[Any] = serve.run(build(arguments, args.top_n), name="search", route_prefix=None)
    for score, text in handle.remote(args.question).result():
        print(f"{score:.3f}  {text[:90]}...")
    serve.delete("search")
    return 0


if __name__ == "__main__":
    sys.exit(main())
