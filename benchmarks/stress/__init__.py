"""Stress the package: what must hold however many callers there are and whatever they send, in figures.

    python -m benchmarks.stress [--only 1,5] [--scale 1.0]

`benchmarks/README.md` says how to read it.
"""
