"""The public port: routes, keys, and each call from its first byte to its log line."""
