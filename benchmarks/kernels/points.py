"""Furthest-point sampling and ball query: what pointnet2_ext runs against its torch reference.

    python -m benchmarks.kernels.points [--device cpu|cuda] [--threads 2] [--check] [--json FILE]

Prints the median time of one call of each and the ratio reference / kernel, in the sizes that SAM-6D's network calls
them with, after checking that both give the same answer. `--check` compares the answers and times nothing, for a run
under NVIDIA's compute-sanitizer on a GPU (racecheck, then memcheck, initcheck and synccheck):

    compute-sanitizer --tool racecheck .venv/bin/python -m benchmarks.kernels.points --device cuda --check

`--json -` prints the figures as JSON instead of the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.benchmark import Timer

import pointnet2_ext
from pem.bench.report import Table, write_json
from pointnet2_ext import reference

SAMPLED = [(1, 2048, 196), (8, 2048, 196), (32, 2048, 196), (1, 210000, 2048)]  # clouds, points, picked
QUERIED = [(2048, 2048, 0.1, 32), (2048, 2048, 0.2, 64)]  # points, centers, radius, slots
REPEATED = 0.4  # share of a small object's points that are repeats, drawn to fill its cloud


class Case(NamedTuple):
    """An operator on one input: the kernel and its reference, ready to be called."""

    op: str
    sizes: str
    kernel: partial[Tensor]
    reference: partial[Tensor]


def cases(device: str) -> Iterator[Case]:
    """Yield a case for every size that is measured."""
    generator = torch.Generator().manual_seed(0)
    for clouds, n, count in SAMPLED:
        points = torch.randn(clouds, n, 3, generator=generator).to(device)
        sizes = f"{clouds} x {n} -> {count}"
        yield _case("furthest_point_sample", sizes, points, count)
    for n, m, radius, count in QUERIED:
        sphere = normalize(torch.randn(1, n, 3, generator=generator), dim=-1)
        again = sphere.clone()
        kept = round(n * (1 - REPEATED))
        again[:, kept:] = sphere[:, torch.randint(kept, (n - kept,), generator=generator)]
        for points, repeated in ((sphere, ""), (again, f", {REPEATED:.0%} repeated")):
            on_device = points.to(device)
            sizes = f"{n} x {m}, radius {radius}, {count} slots{repeated}"
            yield _case("ball_query", sizes, on_device, on_device[:, :m], radius, count)


def _case(op: str, sizes: str, *arguments: Tensor | float) -> Case:
    return Case(op, sizes, partial(getattr(pointnet2_ext, op), *arguments), partial(getattr(reference, op), *arguments))


def median_ms(call: partial[Tensor], threads: int) -> float:
    """Return the median time of one call; the timer warms up and synchronises."""
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=1.0).median * 1e3


def main() -> None:
    """Parse the options, compare, measure, print."""
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of the kernel and of the reference")
    parser.add_argument("--check", action="store_true", help="compare the answers, time nothing")
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - for standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernel = pointnet2_ext.kernel_for(options.device)
    table = Table(["op", "sizes", "reference ms", "kernel ms", "reference / kernel"])
    for case in cases(options.device):
        if not torch.equal(case.kernel(), case.reference()):
            sys.exit(f"{case.op} {case.sizes}: the {kernel} kernel and the reference disagree")
        if not options.check:
            slow, fast = median_ms(case.reference, options.threads), median_ms(case.kernel, options.threads)
            table.add(case.op, case.sizes, slow, fast, slow / fast)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    header = {"device": name, "kernel": kernel, "torch": str(torch.__version__), "threads": options.threads}
    write_json(options.json, {**header, "rows": table.as_dicts()})
    if options.json != "-":
        print(f"{name}: {kernel} kernel, torch {torch.__version__}, {options.threads} threads")
        if options.check:
            print("the kernel and the reference agree on every size")
        else:
            table.print()


if __name__ == "__main__":
    main()
