"""Synthetic objects and scenes with known poses."""
