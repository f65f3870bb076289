"""Stress the package with many callers, bad inputs and failures, and measure what must always hold.

    python -m benchmarks.stress [--only 1,5] [--scale 1.0]

`benchmarks/README.md` explains how to read the output.
"""
