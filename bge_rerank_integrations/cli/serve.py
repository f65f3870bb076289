"""`bge-rerank serve` serves a model over HTTP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from bge_rerank_integrations.cli.logs import log_with_time
from bge_rerank_integrations.cli.options import EXISTING_FILE, config_options
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.runtime.uninterrupted import import_uninterrupted
from bge_rerank_integrations.scorer import Scorer
from bge_rerank_integrations.server.settings import (
    DEFAULT_GRACE_S,
    DEFAULT_MAX_QUEUED_TOKENS,
    ServerSettings,
    check_exposure,
    read_api_key,
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on. 0 chooses a free port.",
)
@click.option(
    "--api-key-file",
    type=EXISTING_FILE,
    help="File with the API key that clients must send.  [default: BGE_RERANK_API_KEY in the environment]",
)
@click.option("--no-auth", is_flag=True, help="Serve without an API key, even if other machines can connect.")
@click.option("--model-name", help="Name of the model in responses.  [default: last part of --model]")
@click.option(
    "--max-body-mib",
    type=float,
    default=ServerSettings.max_body_mib,
    show_default=True,
    help="Maximum size of a request body in MiB.",
)
@click.option(
    "--timeout-s",
    type=float,
    default=ServerSettings.timeout_s,
    show_default=True,
    help="Maximum time to receive the body of a request, and again to score it, in seconds.",
)
@click.option(
    "--grace-s",
    type=float,
    default=DEFAULT_GRACE_S,
    show_default=True,
    help="Maximum time to finish accepted requests after SIGTERM, in seconds.",
)
@click.option(
    "--max-queued-tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_QUEUED_TOKENS,
    show_default=True,
    help="Maximum number of tokens in the queue. A request that exceeds it gets status 429.",
)
@click.option(
    "--max-wait-ms",
    type=float,
    default=0.0,
    show_default=True,
    help="Time that a request waits for others to share a batch, in milliseconds.",
)
@config_options()
def serve(
    config: ScorerConfig,
    host: str,
    port: int,
    api_key_file: Path | None,
    no_auth: bool,
    model_name: str | None,
    max_body_mib: float,
    timeout_s: float,
    grace_s: float,
    max_queued_tokens: int,
    max_wait_ms: float,
) -> None:
    """Serve a model over HTTP.

    The server works with clients of Cohere, Jina, Text Embeddings Inference, vLLM,
    Infinity, Voyage and NVIDIA, and with `RemoteScorer`. Scores are from 0 to 1
    unless a request asks for raw logits. Open the server's address in a
    browser to see what reranking changes.

    Other machines can connect only with an API key, which is read from
    BGE_RERANK_API_KEY or a file. After SIGTERM the server accepts no new requests.
    It finishes the accepted ones and exits with status 0.

    \b
    bge-rerank serve --model embedded
    BGE_RERANK_API_KEY=secret bge-rerank serve --host 0.0.0.0
    curl http://127.0.0.1:8000/v1/rerank -H 'Authorization: Bearer secret' \\
      -d '{"query": "what is a panda?", "documents": ["A bear.", "Tea."]}'
    """
    # Ctrl-C inside of imports can leave their lock taken, and the model is imported in another thread.
    import_uninterrupted("bge_rerank_integrations.server.run")
    from bge_rerank_integrations.server.run import run_server

    # Each request chooses its scale. The scorer therefore returns raw logits.
    config = dataclasses.replace(
        config, max_queued_tokens=max_queued_tokens, max_wait_ms=max_wait_ms, normalize=False
    )
    settings = ServerSettings(
        api_key=read_api_key(api_key_file),
        max_body_mib=max_body_mib,
        timeout_s=timeout_s,
        model_name=model_name,
    )
    host = host.strip("[]")  # IPv6 addresses have brackets in URLs
    check_exposure(host, settings.api_key, no_auth=no_auth)
    log_with_time()

    def load() -> Scorer:
        scorer = Scorer.from_config(config)
        scorer.warmup()
        return scorer

    run_server(
        load,
        settings,
        host=host,
        port=port,
        grace_s=grace_s,
        on_listening=lambda url: click.echo(f"Listening on {url}, loading {config.model}", err=True),
    )
