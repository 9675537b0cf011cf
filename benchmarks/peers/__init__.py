"""Others on the benchmarks' questions, one file each, each run in a process of its own.

Solvers beside the engine, for `benchmarks.accuracy` (`job.py` is what they are given, `ask.py` asks them), and ways to
serve the engine beside this server, for `benchmarks.service.throughput` (`serving.py`, `start.py`).
"""
