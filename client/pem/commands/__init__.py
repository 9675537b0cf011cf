"""The half of `pem` that asks a server: it needs nothing but this package."""
