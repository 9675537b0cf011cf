"""The geometric engine's compiled loops against their torch references, in the sizes that the engine calls them with.

    python -m benchmarks.kernels.geometric [--threads 1] [--json FILE]

Prints the median time of one call of each and the ratio reference / kernel. The kernels use one thread; `--threads` is
for the references. `--json -` prints the same as JSON instead of the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from pem.bench.report import Table, write_json
from posekit.engine import Instance, Rejection
from posekit.geometric import kernels
from posekit.geometric.engine import GeometricEngine
from posekit.geometric.model import Shelf, prepare
from posekit.geometric.observe import Observations, clean, together
from posekit.geometric.picture import visible_surface
from posekit.geometric.poses import Poses
from posekit.geometry import rotation_grid
from posekit.synthetic.shapes import SHAPES

SHAPE = "housing"
DISTANCE_M = 0.6
FOCAL_PX = 600.0
ROLLS = 24
SIDE = 128  # cells per side of a picture, which holds the object with a margin
NOISE_M = 0.001

Call = Callable[[], object]


def calls() -> list[tuple[str, str, Call, Call]]:
    """Return the op, its sizes, and the kernel and the reference on the same input, for each row."""
    stored = GeometricEngine().onboard(SHAPE, SHAPES[SHAPE]().mesh, None, lambda share: None)
    shelf = Shelf.of([prepare(stored, torch.device("cpu"))])
    R = rotation_grid(shelf.view_directions, ROLLS).reshape(1, -1, 3, 3)
    poses = Poses(R, torch.tensor([0.0, 0.0, DISTANCE_M]).expand(1, R.shape[1], 3).contiguous())
    # Points that the first pose shows, with noise; the other poses fit them more or less.
    seen = shelf.surface[shelf.view_samples[0, 0].repeat(2)]
    generator = torch.Generator().manual_seed(0)
    points = seen[:, :3] @ R[0, 0].mT + poses.t[0, 0] + NOISE_M * torch.randn(len(seen), 3, generator=generator)
    normals = seen[:, 3:6] @ R[0, 0].mT
    side_px = 1.25 * shelf.diameter_m * FOCAL_PX / DISTANCE_M
    K = torch.tensor([[[FOCAL_PX, 0, float(side_px) / 2], [0, FOCAL_PX, float(side_px) / 2], [0, 0, 1]]])
    cell_px = side_px / SIDE
    cell_m = cell_px * DISTANCE_M / FOCAL_PX

    def some(count: int) -> Poses:
        return poses.pick(torch.arange(count)[None] * (poses.count // count))

    rows: list[tuple[str, str, Call, Call]] = []
    sizes = f"8 poses, {shelf.dense_samples} samples, {SIDE} x {SIDE} cells"
    drawn = [
        partial(run, shelf, some(8), K, cell_px=cell_px, cell_m=cell_m, rows=SIDE, columns=SIDE)
        for run in (kernels.front, kernels.front_reference)
    ]
    rows.append(("front", sizes, drawn[0], drawn[1]))
    for count, N in ((poses.count, 48), (384, 96)):
        judged = [
            partial(run, shelf, some(count), points[None, :N], normals[None, :N], tolerance_m=0.02 * shelf.diameter_m)
            for run in (kernels.explain, kernels.explain_reference)
        ]
        rows.append(("explain", f"{count} poses, {N} points", judged[0], judged[1]))
    for count, N in ((384, 64), (48, 128), (12, 384)):
        trust = torch.ones(1, count, N)
        pulled = [
            partial(
                run,
                shelf,
                some(count),
                points[None, :N],
                normals[None, :N],
                reach_m=0.1 * shelf.diameter_m,
                trust=trust,
            )
            for run in (kernels.normal_equations, kernels.normal_equations_reference)
        ]
        rows.append(("normal_equations", f"{count} poses, {N} points", pulled[0], pulled[1]))
    crop = _crop(some(1), shelf, K)
    tolerance_m = 0.02 * shelf.diameter_m
    for count, M in ((384, 96), (48, 192)):
        model_points = visible_surface(shelf, some(count), M)
        drawn_in = [
            partial(run, shelf, crop, some(count), model_points, reach_m=2 * tolerance_m, through_m=tolerance_m)
            for run in (kernels.outline_pull, kernels.outline_pull_reference)
        ]
        rows.append(("outline_pull", f"{count} poses, {M} points", drawn_in[0], drawn_in[1]))
    dense = shelf.dense[torch.arange(1024) * (shelf.dense_samples // 1024)].expand(1, 8, -1, -1)
    visible = torch.ones(1, 8, 1024, dtype=torch.bool)
    polished = [
        partial(run, shelf, crop, some(8), dense, visible, reach_m=3 * tolerance_m)
        for run in (kernels.depth_pull, kernels.depth_pull_reference)
    ]
    rows.append(("depth_pull", "8 poses, 1024 points", polished[0], polished[1]))
    for count in (384, 48, 8):
        jacobian = torch.randn(1, count, 64, 6, generator=generator)
        solved = [
            partial(
                run,
                some(count),
                jacobian.mT @ jacobian,
                0.1 * jacobian.mT @ jacobian[..., :1],
                radius_m=shelf.diameter_m / 2,
                most_turn=0.4,
                most_shift=1.0,
                in_camera=False,
            )
            for run in (kernels.moved, kernels.moved_reference)
        ]
        rows.append(("moved", f"{count} poses", solved[0], solved[1]))
    for count, kept in ((384, 64), (64, 12)):
        total = torch.rand(1, count, generator=generator)
        chosen = [
            partial(run, some(count), total, kept, 5.0, 0.03 * shelf.diameter_m)
            for run in (kernels.distinct, kernels.distinct_reference)
        ]
        rows.append(("distinct", f"{kept} of {count} poses", chosen[0], chosen[1]))
    rows.extend(_pictures(shelf, crop, some(8), K, cell_px=cell_px, cell_m=cell_m))
    return rows


def _pictures(
    shelf: Shelf, crop: Observations, poses: Poses, K: Tensor, *, cell_px: Tensor, cell_m: Tensor
) -> list[tuple[str, str, Call, Call]]:
    """Return the rows of the ops on drawn poses, `SIDE` cells wide and high."""
    depth_m, sample = kernels.front(shelf, poses, K, cell_px=cell_px, cell_m=cell_m, rows=SIDE, columns=SIDE)
    assert shelf.dense_colours is not None
    seen = shelf.dense_colours[sample[:, 0]] / 255.0
    rays = torch.tensor([0.0, 0.0, 1.0]).expand(1, SIDE, SIDE, 3).contiguous()
    use = torch.isfinite(depth_m) & torch.isfinite(depth_m[:, :1])
    spreads = [
        partial(run, shelf, poses, depth_m, sample, rays, noise_m=cell_m, cell_m=cell_m)
        for run in (kernels.spread, kernels.spread_reference)
    ]
    costs = [
        partial(run, shelf, crop, poses, sample, seen, rays, use)
        for run in (kernels.colour_cost, kernels.colour_cost_reference)
    ]
    sizes = f"{poses.count} poses, {SIDE} x {SIDE} cells"
    return [
        ("spread", sizes, spreads[0], spreads[1]),
        ("colour_cost", f"{sizes}, {int(use.sum())} count", costs[0], costs[1]),
    ]


def _crop(pose: Poses, shelf: Shelf, K: Tensor) -> Observations:
    """Return a camera's view of the object at `pose`, with a wall behind it."""
    side = round(2 * float(K[0, 0, 2]))
    one = torch.ones(1)
    drawn_m = kernels.front(shelf, pose, K, cell_px=one, cell_m=one * DISTANCE_M / FOCAL_PX, rows=side, columns=side)[0]
    mask = torch.isfinite(drawn_m[0, 0])
    depth_m = torch.where(mask, drawn_m[0, 0], 2 * DISTANCE_M)
    instance = Instance(
        object_id=SHAPE,
        rgb=np.full((side, side, 3), 128, dtype=np.uint8),
        depth_m=depth_m.numpy(),
        mask=mask.numpy(),
        K=K[0].double().numpy(),
        seed=0,
    )
    cleaned = clean(instance, float(shelf.diameter_m))
    assert not isinstance(cleaned, Rejection)
    return together([cleaned], shelf.diameter_m)


def median_ms(call: Call, threads: int) -> float:
    """Return the median time of one call; the timer warms up."""
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=0.5).median * 1e3


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - for standard output")
    options = parser.parse_args()
    if kernels.kernel_for("cpu") == "reference":
        sys.exit("the kernels are not built; build them with: make setup")
    table = Table(["op", "sizes", "reference ms", "kernel ms", "reference / kernel"])
    with torch.inference_mode():
        for op, sizes, kernel, reference in calls():
            slow, fast = median_ms(reference, options.threads), median_ms(kernel, options.threads)
            table.add(op, sizes, slow, fast, slow / fast)
    write_json(options.json, {"torch": str(torch.__version__), "threads": options.threads, "rows": table.as_dicts()})
    if options.json != "-":
        print(f"torch {torch.__version__}, {options.threads} threads")
        table.print()


if __name__ == "__main__":
    main()
