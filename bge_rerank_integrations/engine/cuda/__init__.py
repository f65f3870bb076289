"""Kernels, graphs and copies for CUDA devices."""
