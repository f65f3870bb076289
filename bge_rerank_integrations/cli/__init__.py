"""The `bge-rerank` command line."""
