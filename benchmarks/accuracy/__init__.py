"""Measure how accurate the poses are, on sets with known truth."""
