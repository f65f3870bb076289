"""Many callers of one model: contenders in process and over HTTP, and the loads that measure them."""
