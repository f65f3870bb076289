"""Collects the requests of many callers in one queue and runs them in shared batches."""
