"""`python -m bge_rerank_integrations.cli`, where scripts are not on the path."""

from bge_rerank_integrations.cli.app import main

main(prog_name="bge-rerank")
