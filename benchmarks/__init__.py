"""Reproducible benchmarks of speed, memory and ranking fidelity."""
