"""The pose estimation network's speed: our engine's fast setting against the plain network of plain.py.

    python -m benchmarks.network [--batches 1,4,8] [--threads 2] [--repeats 3] [--exact] [--weights FILE] [--json FILE]

Prints one table per batch: CPU seconds of the process and wall time per instance, stage by stage, and the ratio of the
CPU seconds. The settings take turns in one run, on the same inputs and the same weights. Each figure is the median over
the repeats; "all, at best" is the fastest repeat. A stage without a figure of ours is stored with the object in ours,
or is part of another stage: the ball query belongs to the position encoding. Onboarding is not timed. Plain runs the
batch as one. Ours runs instance by instance, with as many at once as there are threads, as its engine does on a CPU.

Inputs are those of `../shared/sam6d/golden.npz` beside the project's root, its two instances in turn, with other draws;
without that file, synthetic ones of the same sizes. Weights are generated unless a checkpoint is given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.network import generated_weights
from benchmarks.network import plain as plain_network
from benchmarks.network.parity import Golden, objects
from benchmarks.network.plain import Stages
from pem.bench.report import Table, write_json
from posekit.geometry import rotation_angle_deg
from posekit.sam6d.checkpoint.weights import load_state_dict
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.features import normalize
from posekit.sam6d.network.whole import Network, Poses, Scene
from posekit.sam6d.quick.cpu import FastNetwork
from posekit.surface import sample_surface
from posekit.synthetic.shapes import SHAPES

GOLDEN = generated_weights.SHARED / "golden.npz"
SYNTHETIC = ("housing", "bracket")
QUIET_LOAD = 0.7  # load of the last minute, before the run; above it, other programs show in the figures
MUST_RATIO, AIM_RATIO, MUST_CPU_S, JUDGED_BATCH = 4, 8, 7, 4
CONFIG = Config()

#: our methods -> the stages of the plain network that they match
OURS = {
    "features": "image features",
    "thin": "furthest-point sampling",
    "structure": "geometry embedding, scene",
    "match_coarsely": "coarse matching",
    "coarse_pose": "coarse pose",
    "position_encoding": "position encoding, scene",
    "match_finely": "fine matching",
    "fine_pose": "fine pose",
}
REST = "rest"
POINT_OPERATORS = ("furthest-point sampling", "ball query")


class Seen(NamedTuple):
    """D different instances, each with an object of its own, in metres."""

    rgb: Tensor  # (D, 224, 224, 3) uint8, masked, BGR
    points: Tensor  # (D, 2048, 3) in the camera's frame
    choose: Tensor  # (D, 2048) int64, flat pixel of each point
    surface: Tensor  # (D, 1024, 3) of the CAD
    object_points: Tensor  # (D, 2048, 3) in the CAD's frame, in furthest-point order
    object_features: Tensor  # (D, 2048, C)


def golden_instances(network: Network) -> Seen:
    """Return the instances of the file of reference numbers; the network computes object features of its views."""
    golden = Golden(GOLDEN)
    object_points, object_features = objects(network, golden)
    return Seen(
        rgb=golden.tensor("in_rgb"),
        points=golden.tensor("in_pts"),
        choose=golden.tensor("in_rgb_choose"),
        surface=golden.tensor("in_model"),
        object_points=object_points,
        object_features=object_features,
    )


def synthetic_instances(network: Network) -> Seen:
    """Return synthetic instances of the same sizes.

    The shapes are half a metre away, seen from one side. Pictures and object features are noise.
    """
    rng = np.random.default_rng(0)
    rows = []
    for shape in SYNTHETIC:
        points, normals, _, _ = sample_surface(SHAPES[shape]().mesh, 8 * CONFIG.fine_points)
        cloud = torch.from_numpy(points).float()
        facing = np.flatnonzero(normals[:, 2] < 0)
        pixels = rng.integers(0, CONFIG.image_px**2, CONFIG.fine_points)
        rows.append(
            (
                torch.from_numpy(rng.integers(0, 256, (CONFIG.image_px, CONFIG.image_px, 3), dtype=np.uint8)),
                cloud[rng.choice(facing, CONFIG.fine_points)] + torch.tensor([0.0, 0.0, 0.5]),
                torch.from_numpy(pixels),
                cloud[rng.choice(len(cloud), CONFIG.model_points)],
                cloud[network.pick(cloud)],
                torch.from_numpy(rng.standard_normal((CONFIG.fine_points, CONFIG.channels), dtype=np.float32)),
            )
        )
    return Seen(*(torch.stack(column) for column in zip(*rows, strict=True)))


class Pass(NamedTuple):
    """One batch: indices of its instances, and their random draws."""

    which: Tensor  # (B,)
    uniforms: Tensor  # (B, 3 * proposals)

    @classmethod
    def of(cls, batch: int, different: int) -> Pass:
        """Take the different instances in turn, each row with draws of its own."""
        generator = torch.Generator().manual_seed(0)
        return cls(torch.arange(batch) % different, torch.rand(batch, 3 * CONFIG.proposals, generator=generator))


Run = Callable[[Pass, Stages], plain_network.Poses]  # a pass of one setting


def plain_run(weights: dict[str, Tensor], seen: Seen, one: Pass, stages: Stages) -> plain_network.Poses:
    """Run a pass of the plain network."""
    rows = Seen(*(column[one.which] for column in seen))
    inputs = plain_network.Inputs(
        rgb=normalize(rows.rgb),
        points_m=rows.points,
        choose=rows.choose,
        model_m=rows.surface,
        object_points_m=rows.object_points,
        object_features=rows.object_features,
        uniforms=one.uniforms,
    )
    with stages(REST):
        return plain_network.estimate(weights, inputs, stages)


class Ours:
    """A network with timed stages, and its models of the instances' objects.

    Instances run as Sam6dEngine runs them on a CPU: each by itself, as many at once as there are threads. The rest of
    the batch runs one after the other on all threads.
    """

    def __init__(self, network: Network, seen: Seen, threads: int) -> None:
        self._network, self._seen, self._threads = network, seen, threads
        self._here = threading.local()  # .stages: of this thread's pass
        self._pool = ThreadPoolExecutor(threads)
        each = zip(seen.object_points, seen.object_features, seen.surface, strict=True)
        self._models = [network.model(network.describe(*(of[None] for of in one))) for one in each]
        for method, stage in OURS.items():
            setattr(network, method, partial(self._timed, getattr(network, method), stage))

    def run(self, one: Pass, stages: Stages) -> plain_network.Poses:
        """Run a pass."""
        rows = list(zip(one.which.tolist(), one.uniforms, strict=True))
        in_company = len(rows) - len(rows) % self._threads if self._threads > 1 else 0
        with stages(REST):
            torch.set_num_threads(1)
            answers = list(self._pool.map(partial(self._alone, time.thread_time), rows[:in_company]))
            torch.set_num_threads(self._threads)
            answers += [self._alone(time.process_time, row) for row in rows[in_company:]]
            for index, (_, inner) in enumerate(answers):
                stages.move(inner, 1 / self._threads if index < in_company else 1.0)
        columns = zip(*(poses for poses, _ in answers), strict=True)
        return plain_network.Poses(*(torch.cat(column) for column in columns))

    @torch.inference_mode()
    def _alone(self, cpu_clock: Callable[[], float], row: tuple[int, Tensor]) -> tuple[Poses, Stages]:
        which, uniforms = row
        seen, stages = self._seen, Stages(cpu_clock)
        self._here.stages = stages
        scene = Scene(seen.rgb[which, None], seen.points[which, None], seen.choose[which, None], uniforms[None])
        with stages(REST):
            return self._network(scene, self._models[which]), stages

    def _timed(self, method: Callable[..., Any], stage: str, *arguments: Any) -> Any:
        with self._here.stages(stage):
            return method(*arguments)


class Cost(NamedTuple):
    """Seconds per instance."""

    cpu_s: float
    wall_s: float


class Timed:
    """The runs of one setting at one batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.runs: list[Stages] = []

    def stage(self, name: str) -> Cost | None:
        """Return the median of a stage; None if the setting has no such stage."""
        if name not in self.runs[0].cpu_s:
            return None
        return Cost(*(statistics.median(of[name] for of in each) / self.batch for each in self._seconds()))

    def whole(self, without: tuple[str, ...] = (), choose: Callable[[list[float]], float] = statistics.median) -> Cost:
        """Return the cost of all stages but some: the median of the runs, or another choice of them."""
        sums = ([sum(of[name] for name in of if name not in without) for of in each] for each in self._seconds())
        return Cost(*(choose(runs) / self.batch for runs in sums))

    def _seconds(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        return [run.cpu_s for run in self.runs], [run.wall_s for run in self.runs]


class Measured(NamedTuple):
    """The results of one batch: costs by setting, and the difference between fast's and plain's poses."""

    timed: dict[str, Timed]
    difference: tuple[float, float]  # largest difference, degrees and millimetres


def measure(settings: dict[str, Run], one: Pass, repeats: int) -> Measured:
    """Run the settings in turn."""
    timed = {name: Timed(len(one.which)) for name in settings}
    poses = {}
    for _ in range(repeats):
        for name, run in settings.items():
            stages = Stages()
            poses[name] = run(one, stages)
            timed[name].runs.append(stages)
    return Measured(timed, apart(poses["fast"], poses["plain"]))


def apart(a: plain_network.Poses, b: plain_network.Poses) -> tuple[float, float]:
    """Return the largest difference between two sets of poses: degrees and millimetres."""
    turned = rotation_angle_deg(a.R.double(), b.R.double()).max()
    return float(turned), float((a.t_m - b.t_m).norm(dim=1).max() * 1000)


def table_of(timed: dict[str, Timed]) -> Table:
    """Make a row for each of plain's stages and for all together; ratios of CPU seconds, plain over fast."""
    columns = [f"{name} {what}" for name in timed for what in ("cpu s", "wall s")]
    table = Table(["stage", *columns, "plain / fast"])

    def add(title: str, costs: dict[str, Cost | None]) -> None:
        figures = [figure for cost in costs.values() for figure in (cost or ("", ""))]
        plain, fast = costs["plain"], costs["fast"]
        table.add(title, *figures, plain.cpu_s / fast.cpu_s if plain and fast else "")

    for stage in sorted(timed["plain"].runs[0].cpu_s, key=[REST].count):
        add(stage, {name: of.stage(stage) for name, of in timed.items()})
    add("all", {name: of.whole() for name, of in timed.items()})
    add("all, at best", {name: of.whole(choose=min) for name, of in timed.items()})
    return table


def verdict(timed: dict[str, Timed], threads: int) -> dict[str, Any]:
    """Summarise the batch's figures."""
    plain, fast = timed["plain"].whole(), timed["fast"].whole()
    without = timed["plain"].whole(POINT_OPERATORS)
    batch = timed["fast"].batch
    return {
        "batch": batch,
        "threads": threads,
        "ratio_cpu": plain.cpu_s / fast.cpu_s,
        "ratio_wall": plain.wall_s / fast.wall_s,
        "ratio_cpu_without_point_operators": without.cpu_s / fast.cpu_s,
        "fast_cpu_s": fast.cpu_s * batch,
        "plain_cpu_s": plain.cpu_s * batch,
    }


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", default="1,4,8", help="instances of a pass, separated by commas (1,4,8)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exact", action="store_true", help="our exact setting as well")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint that was imported")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here (- for standard output)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if options.weights is None and not generated_weights.available():
        sys.exit(f"there is no {generated_weights.SHARED} to generate weights from; give --weights FILE")

    weights = load_state_dict(options.weights) if options.weights else generated_weights.state_dict()
    exact = Network()
    exact.load_state_dict(weights)
    fast = FastNetwork.of(exact)
    with torch.inference_mode():
        seen = golden_instances(exact) if GOLDEN.is_file() else synthetic_instances(exact)
        settings: dict[str, Run] = {"plain": partial(plain_run, weights, seen)}
        settings["fast"] = Ours(fast, seen, options.threads).run
        if options.exact:
            settings["exact"] = Ours(exact, seen, options.threads).run
        for run in settings.values():
            run(Pass.of(1, 2), Stages())
        batches = [int(text) for text in options.batches.split(",")]
        found = {batch: measure(settings, Pass.of(batch, 2), options.repeats) for batch in batches}

    if options.json != "-":
        report(found, options.threads, load)
    write_json(
        options.json,
        {
            "torch": str(torch.__version__),
            "load_before": load,
            "batches": [
                {**verdict(of.timed, options.threads), "stages": table_of(of.timed).as_dicts()} for of in found.values()
            ],
        },
    )


def report(found: dict[int, Measured], threads: int, load: float) -> None:
    """Print the tables and their summary."""
    print(f"torch {torch.__version__}, {threads} threads, load average before the run {load:.2f}")
    if load > QUIET_LOAD:
        print(f"warning: the machine was busy (load average above {QUIET_LOAD}), the figures contain others' work")
    for batch, (timed, difference) in found.items():
        came_to = verdict(timed, threads)
        print(f"\nbatch {batch}: seconds an instance")
        table_of(timed).print()
        print(f"fast's poses differ from plain's by at most {difference[0]:.2g} degrees and {difference[1]:.2g} mm")
        print(
            f"plain without its point operators' torch reference: "
            f"{came_to['ratio_cpu_without_point_operators']:.1f} times fast's CPU seconds"
        )
    if JUDGED_BATCH in found:
        came_to = verdict(found[JUDGED_BATCH].timed, threads)
        print(
            f"\nfast is {came_to['ratio_cpu']:.1f} times plain at batch {JUDGED_BATCH} on {threads} threads "
            f"({came_to['ratio_wall']:.1f} by wall time; must: {MUST_RATIO}, aim: {AIM_RATIO}); "
            f"{came_to['fast_cpu_s']:.1f} CPU s for {JUDGED_BATCH} instances (must: < {MUST_CPU_S})"
        )


if __name__ == "__main__":
    main()
