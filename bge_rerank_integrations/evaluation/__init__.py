"""Evaluation of ranking quality: datasets, runs, measures and plots."""
