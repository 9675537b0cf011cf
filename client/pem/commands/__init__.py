"""The half of `pem` that asks a server. It needs only this package."""
