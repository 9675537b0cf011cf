"""Measure the memory of an engine with its objects loaded, in a process of its own for `benchmarks.accuracy.run`.

    python -m benchmarks.accuracy.memory DEVICE THREADS < PICKLE

The pickle holds the object models by name and some instances. The process imports what a pose worker imports, no more.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Literal

from posekit.geometric.engine import GeometricEngine


def resident_mb(pid: int | Literal["self"] = "self") -> float:
    """Return a process's resident memory in MB (10^6 bytes)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"process {pid} has no resident memory")
    return int(found[1]) * 1024 / 1e6


def main() -> None:
    """Load, measure, pass once, measure again, print JSON."""
    engine = GeometricEngine(sys.argv[1], int(sys.argv[2]))
    models, instances = pickle.load(sys.stdin.buffer)
    for model in models.values():
        engine.prepare(model)
    loaded = resident_mb()
    engine.estimate(instances, models)
    print(json.dumps({"objects": len(models), "loaded_mb": loaded, "pass_mb": resident_mb()}))


if __name__ == "__main__":
    main()
