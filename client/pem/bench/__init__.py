"""A load generator for pose servers: `pem bench`."""
