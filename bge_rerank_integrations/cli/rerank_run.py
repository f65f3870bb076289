"""`bge-rerank rerank-run` reranks a TREC run."""

from __future__ import annotations

import os
from pathlib import Path

import click

from bge_rerank_integrations.cli.console import require_stdout
from bge_rerank_integrations.cli.jobs.job_record import resolve_output
from bge_rerank_integrations.cli.options import (
    EXISTING_FILE,
    EXISTING_FOLDER,
    config_options,
    output_option,
    quiet_option,
    shows_progress,
)
from bge_rerank_integrations.cli.summary import print_summary
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.errors import DatasetError
from bge_rerank_integrations.evaluation.datasets import format_run, read_corpus, read_queries, read_run
from bge_rerank_integrations.evaluation.runs import rerank_run
from bge_rerank_integrations.scorer import Scorer


@click.command("rerank-run")
@click.argument("run", type=EXISTING_FILE)
@click.argument("folder", type=EXISTING_FOLDER)
@output_option("-o", "--output", text="Output file.  [default: stdout]")
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Passages to rerank per query. The output contains no others.",
)
@click.option("--tag", default="bge-rerank", show_default=True, help="Last column of the output.")
@quiet_option
@config_options()
def rerank_run_command(
    config: ScorerConfig,
    run: Path,
    folder: Path,
    output: Path | None,
    depth: int,
    tag: str,
    quiet: bool,
) -> None:
    """Rerank a TREC run.

    RUN is the TREC run of a first stage. FOLDER is a BEIR folder with the texts, in
    corpus.jsonl and queries.jsonl. The output is a TREC run in UTF-8.

    \b
    bge-rerank rerank-run bm25.trec scifact/ -o reranked.trec
    trec_eval -m ndcg_cut.10 qrels.trec reranked.trec
    """
    if not tag or len(tag.split()) != 1:
        raise click.UsageError("--tag must be one word without spaces")
    inputs = [path.resolve() for path in (run, folder / "corpus.jsonl", folder / "queries.jsonl")]
    if output is None:
        require_stdout()
    else:
        output = resolve_output(output)
        if output in inputs:
            raise click.UsageError(f"{output} is one of the inputs; choose another output file")
        if output.exists() and not output.is_file():
            raise DatasetError(f"{output} is not a regular file; to write to stdout, give no output file")
        # `OUTPUT.partial` may hold the rows of an interrupted `rank`.
        partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
        # A folder that is read-only must fail before the work begins.
        partial.touch()
        partial.unlink()
    first = {query_id: dict(list(scores.items())[:depth]) for query_id, scores in read_run(run).items()}
    corpus, queries = read_corpus(folder), read_queries(folder)
    with Scorer.from_config(config) as scorer:
        reranked = rerank_run(scorer, queries, corpus, first, progress=shows_progress(quiet))
    # Ids are data, so they are written as UTF-8 to files and pipes, independent of the console's encoding.
    text = "".join(format_run(reranked.run, tag)).encode("utf-8", "surrogateescape")
    if output is None:
        click.echo(text, nl=False)
    else:
        try:
            partial.write_bytes(text)
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    print_summary(reranked.num_truncated, reranked.num_truncated_queries, config)
