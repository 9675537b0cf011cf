"""The engine that needs no weights: depth, mask and CAD in, pose out. Importing this package is cheap."""

VERSION = "2"
