"""Weights: where they come from, which they are, how they are read."""
