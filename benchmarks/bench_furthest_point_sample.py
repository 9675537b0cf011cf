"""Furthest-point sampling: what pointnet2_ext runs against its torch reference.

    python -m benchmarks.bench_furthest_point_sample [--device cpu|cuda] [--threads 2] [--json FILE]

Prints the median time of a call and the ratio peer / ours. `--json -` prints the same as JSON instead of the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import pointnet2_ext
from pointnet2_ext import reference

OURS, PEER = "pointnet2_ext", "torch reference"
PEERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    OURS: pointnet2_ext.furthest_point_sample,
    PEER: reference.furthest_point_sample,
}
SIZES = [(1, 2048, 196), (8, 2048, 196), (32, 2048, 196), (1, 16384, 1024)]  # batch, points, count


def median_ms(call: Callable[[Tensor, int], Tensor], points: Tensor, count: int, threads: int) -> float:
    """The median time of one call; the timer warms up and synchronises."""
    timer = Timer("call(points, count)", globals={"call": call, "points": points, "count": count}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=1.0).median * 1e3


def measure(device: str, threads: int) -> list[dict[str, float]]:
    """One row per size; both peers on the same points, and on one answer."""
    torch.set_num_threads(threads)
    rows = []
    for batch, n, count in SIZES:
        points = torch.randn(batch, n, 3, generator=torch.Generator().manual_seed(n)).to(device)
        if device == "cpu":
            assert torch.equal(PEERS[OURS](points, count), PEERS[PEER](points, count)), "the peers disagree"
        times = {name: median_ms(call, points, count, threads) for name, call in PEERS.items()}
        ratio = times[PEER] / times[OURS]
        rows.append({"batch": batch, "points": n, "count": count, "ours_ms": times[OURS], "peer_ms": times[PEER]})
        rows[-1]["peer_over_ours"] = ratio
    return rows


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - for standard output")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    header = {
        "device": f"{options.device} ({name})",
        "kernel": pointnet2_ext.kernel_for(options.device),
        "torch": torch.__version__,
        "threads": options.threads,
    }
    rows = measure(options.device, options.threads)
    if options.json:
        text = json.dumps({**header, "rows": rows}, indent=2) + "\n"
        sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text)
    if options.json != "-":
        print(f"{header['device']}: {header['kernel']} kernel, torch {header['torch']}, {header['threads']} threads")
        print(f"{'batch':>5} {'points':>6} {'count':>5} {OURS + ' ms':>16} {PEER + ' ms':>18} {'peer / ours':>11}")
        for row in rows:
            sizes = f"{row['batch']:5d} {row['points']:6d} {row['count']:5d}"
            print(f"{sizes} {row['ours_ms']:16.3f} {row['peer_ms']:18.3f} {row['peer_over_ours']:10.1f}x")


if __name__ == "__main__":
    main()
