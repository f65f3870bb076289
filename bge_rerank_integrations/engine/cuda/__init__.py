"""What only CUDA devices run."""
