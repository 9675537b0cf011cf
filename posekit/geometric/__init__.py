"""The engine without weights: it computes a pose from depth, mask and CAD. Importing this package is cheap."""

VERSION = "2"
