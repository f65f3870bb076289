"""`python -m bge_rerank_integrations.cli` runs the command line without the `bge-rerank` script."""

from bge_rerank_integrations.cli.app import main

main(prog_name="bge-rerank")
