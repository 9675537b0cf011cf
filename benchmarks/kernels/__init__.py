"""Compiled kernels beside their torch reference."""
