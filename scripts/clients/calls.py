"""Calls a rerank server through the clients that this environment has, and prints what came back as JSON.

Reads from stdin: `{"url": ..., "key": ..., "query": ..., "documents": [...]}`. Prints a line for each client:
its name, and either the order of the documents or what the client told of the error.

Usage: python calls.py NAME...
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

# Before the clients are imported: none of them may report home.
os.environ.update(
    DO_NOT_TRACK="1",
    HAYSTACK_TELEMETRY_ENABLED="False",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    HF_HUB_OFFLINE="1",
    NO_PROXY="127.0.0.1",
)

MODEL = "any-name"


def cohere_v1(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    import cohere

    client = cohere.Client(key, base_url=url)
    return [each.index for each in client.rerank(model=MODEL, query=query, documents=documents).results]


def cohere_v2(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    import cohere

    client = cohere.ClientV2(key, base_url=url)
    return [each.index for each in client.rerank(model=MODEL, query=query, documents=documents).results]


def langchain_cohere(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from langchain_cohere import CohereRerank

    reranker = CohereRerank(model=MODEL, cohere_api_key=key, base_url=url, top_n=len(documents))
    return _langchain(reranker, query, documents)


def langchain_nvidia(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    return _langchain(NVIDIARerank(base_url=url + "/v1", api_key=key, top_n=len(documents)), query, documents)


def langchain_voyageai(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from langchain_voyageai import VoyageAIRerank

    reranker = VoyageAIRerank(model=MODEL, api_key=key, base_url=url + "/v1", top_k=len(documents))
    return _langchain(reranker, query, documents)


def llama_index_tei(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    return _llama_index(
        TextEmbeddingInference(base_url=url, auth_token=key, top_n=len(documents)), query, documents
    )


def llama_index_jinaai(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return _llama_index(JinaRerank(base_url=url + "/v1", api_key=key, top_n=len(documents)), query, documents)


def llama_index_nvidia(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

    return _llama_index(
        NVIDIARerank(base_url=url + "/v1", api_key=key, top_n=len(documents)), query, documents
    )


def litellm_cohere(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _litellm("cohere", url + "/v2/rerank", key, query, documents)


def litellm_jina_ai(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _litellm("jina_ai", url + "/v1/rerank", key, query, documents)


def litellm_hosted_vllm(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _litellm("hosted_vllm", url, key, query, documents)


def litellm_huggingface(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _litellm("huggingface", url, key, query, documents)


def litellm_infinity(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _litellm("infinity", url + "/infinity", key, query, documents)


def litellm_voyage(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _litellm("voyage", url + "/voyage", key, query, documents)


def rerankers_cohere(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _rerankers("cohere", url + "/v1/rerank", key, query, documents)


def rerankers_jina(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _rerankers("jina", url + "/v1/rerank", key, query, documents)


def rerankers_voyage(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _rerankers("voyage", url + "/v1/rerank", key, query, documents)


def rerankers_tei(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    return _rerankers("text-embeddings-inference", url + "/rerank", key, query, documents)


def haystack_tei(url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    ranker = HuggingFaceTEIRanker(url=url, top_k=len(documents), token=Secret.from_token(key))
    given = [Document(content=text, meta={"at": at}) for at, text in enumerate(documents)]
    return [each.meta["at"] for each in ranker.run(query=query, documents=given)["documents"]]


def _langchain(reranker: Any, query: str, documents: list[str]) -> list[int]:
    from langchain_core.documents import Document

    given = [Document(page_content=text, metadata={"at": at}) for at, text in enumerate(documents)]
    return [each.metadata["at"] for each in reranker.compress_documents(given, query)]


def _llama_index(reranker: Any, query: str, documents: list[str]) -> list[int]:
    from llama_index.core.schema import NodeWithScore, TextNode

    given = [NodeWithScore(node=TextNode(text=text, id_=str(at))) for at, text in enumerate(documents)]
    return [int(each.node.node_id) for each in reranker.postprocess_nodes(given, query_str=query)]


def _litellm(provider: str, api_base: str, key: str, query: str, documents: list[str]) -> list[int]:
    import litellm

    litellm.suppress_debug_info = True
    answer = litellm.rerank(
        model=f"{provider}/{MODEL}", query=query, documents=documents, api_base=api_base, api_key=key
    )
    return [each["index"] for each in answer.results]


def _rerankers(provider: str, url: str, key: str, query: str, documents: list[str]) -> list[int]:
    from rerankers.models.api_rankers import APIRanker

    ranker = APIRanker(MODEL, key, provider, verbose=0, url=url)
    return [each.document.doc_id for each in ranker.rank(query, documents).results]


CLIENTS: dict[str, Callable[[str, str, str, list[str]], list[int]]] = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and not name.startswith("_") and function.__module__ == __name__
}


def main() -> None:
    asked = json.load(sys.stdin)
    for name in sys.argv[1:]:
        try:
            outcome: dict[str, Any] = {"order": CLIENTS[name](**asked)}
        except Exception as error:
            chain: list[BaseException] = []
            current: BaseException | None = error
            while current is not None and current not in chain:
                chain.append(current)
                current = current.__cause__ or current.__context__
            told = [f"{type(each).__name__} {each} {_attributes(each)}" for each in chain]
            outcome = {"error": " <- ".join(told), "traceback": traceback.format_exc()}
        print(json.dumps({"client": name, **outcome}), flush=True)


def _attributes(error: BaseException) -> str:
    """Return the status that an error of an HTTP library carries."""
    response = getattr(error, "response", None)
    return str(getattr(error, "status_code", "") or getattr(response, "status_code", ""))


if __name__ == "__main__":
    main()
