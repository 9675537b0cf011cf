"""Peers for the benchmarks' questions, one file each, each run in a process of its own.

Solvers beside the engine, for `benchmarks.accuracy` (`job.py` defines their input, `ask.py` asks them), and ways to
serve the engine beside this server, for `benchmarks.service.throughput` (`serving.py`, `start.py`).
"""
