"""One file for each family of wire formats: pure functions from and to JSON objects."""
