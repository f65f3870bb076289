"""Code that runs on CPUs only."""
