"""The public port: routes, keys, bodies, and a call from its first byte to its log line."""
