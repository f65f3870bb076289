"""Datasets, runs, measures and plots."""
