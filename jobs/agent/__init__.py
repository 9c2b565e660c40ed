"""One process a host that starts, watches and ends its ranks."""
