"""Many callers, one queue."""
