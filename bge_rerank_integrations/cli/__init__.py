"""The command line, `bge-rerank`."""
