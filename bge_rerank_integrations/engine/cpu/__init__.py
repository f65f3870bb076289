"""What only CPUs run."""
