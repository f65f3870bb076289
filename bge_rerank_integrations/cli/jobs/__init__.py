"""Files of requests: read, ranked, resumed."""
