"""Admission, turns, and the time of each request. Knows a task only through the protocols in work.py."""
