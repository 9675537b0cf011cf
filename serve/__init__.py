"""The service around the model: gateway, supervisor, CAD store, client and command line."""

__version__ = "0.1.0"
