"""The pose estimation network's speed: the setting `fast` against `exact`, which is the published arithmetic.

    python -m benchmarks.network [--batches 1,4,8] [--threads 2] [--repeats 3] [--weights FILE] [--json FILE]

Prints one table per batch: seconds of the process's CPUs and of wall time an instance, stage by stage, and the ratio of
the CPU seconds. The settings take turns in one run, on the same inputs and the same weights; each figure is the median
over the repeats, and "all, at best" the fastest repeat. Both run instance by instance with as many at once as there are
threads, as the engine does on a CPU, and both keep what depends on the object alone: onboarding is not timed.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.network import generated_weights
from benchmarks.network.parity import Golden, objects
from pem.bench.report import Table, write_json
from posekit.geometry import rotation_angle_deg
from posekit.sam6d.checkpoint.weights import load_state_dict
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.whole import Network, Poses, Scene
from posekit.sam6d.quick.cpu import FastNetwork
from posekit.surface import sample_surface
from posekit.synthetic.shapes import SHAPES

GOLDEN = generated_weights.SHARED / "golden.npz"
SYNTHETIC = ("housing", "bracket")
QUIET_LOAD = 0.7  # of the last minute, before the run: above it others' work shows in the figures
CONFIG = Config()

#: the network's methods that are timed, and what their stages are called
METHODS = {
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


class Stages:
    """Seconds of wall time and of the process's CPUs by stage; a stage entered again adds up.

    A stage inside another has its seconds for itself: the outer one's are without them, and all add up to the whole.
    """

    def __init__(self, cpu_clock: Callable[[], float] = time.process_time) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}
        self._cpu_clock = cpu_clock
        self._open: list[str] = []
        self._since = (0.0, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        self._book_open()
        self._open.append(name)
        try:
            yield
        finally:
            self._book_open()
            self._open.pop()

    def move(self, inner: Stages, wall_share: float) -> None:
        """Give to the stages of `inner` what it measured inside the stage that is open now.

        `wall_share`: how much of its wall time passed here; 1 / n where n such ran at once.
        """
        self._book_open()
        for name in inner.wall_s:
            wall_s, cpu_s = inner.wall_s[name] * wall_share, inner.cpu_s[name]
            self._book(name, wall_s, cpu_s)
            self._book(self._open[-1], -wall_s, -cpu_s)

    def _book_open(self) -> None:
        """Give the time since the last change to the innermost stage."""
        now = (time.perf_counter(), self._cpu_clock())
        if self._open:
            self._book(self._open[-1], now[0] - self._since[0], now[1] - self._since[1])
        self._since = now

    def _book(self, name: str, wall_s: float, cpu_s: float) -> None:
        self.wall_s[name] = self.wall_s.get(name, 0.0) + wall_s
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + cpu_s


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


Run = Callable[[Pass, Stages], Poses]  # a pass of one setting


class Setting:
    """A network whose stages are timed, and its models of the instances' objects.

    Instances run as Sam6dEngine runs them on a CPU: each by itself, as many at once as there are threads. The rest of
    the batch runs one after the other on all threads.
    """

    def __init__(self, network: Network, seen: Seen, threads: int) -> None:
        self._network, self._seen, self._threads = network, seen, threads
        self._here = threading.local()  # .stages: of this thread's pass
        self._pool = ThreadPoolExecutor(threads)
        each = zip(seen.object_points, seen.object_features, seen.surface, strict=True)
        self._models = [network.model(network.describe(*(of[None] for of in one))) for one in each]
        for method, stage in METHODS.items():
            setattr(network, method, partial(self._timed, getattr(network, method), stage))

    def run(self, one: Pass, stages: Stages) -> Poses:
        """A pass."""
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
        return Poses(*(torch.cat(column) for column in columns))

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

    def stage(self, name: str) -> Cost:
        """The median of a stage."""
        return Cost(*(statistics.median(of[name] for of in each) / self.batch for each in self._seconds()))

    def whole(self, choose: Callable[[list[float]], float] = statistics.median) -> Cost:
        """All stages together: the median of the runs, or another choice of them."""
        sums = ([sum(of.values()) for of in each] for each in self._seconds())
        return Cost(*(choose(runs) / self.batch for runs in sums))

    def _seconds(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        return [run.cpu_s for run in self.runs], [run.wall_s for run in self.runs]


class Measured(NamedTuple):
    """One batch: costs by setting, and the difference between fast's and exact's poses."""

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
    return Measured(timed, apart(poses["fast"], poses["exact"]))


def apart(a: Poses, b: Poses) -> tuple[float, float]:
    """The largest difference between two sets of poses: degrees and millimetres."""
    turned = rotation_angle_deg(a.R_cam_obj.double(), b.R_cam_obj.double()).max()
    return float(turned), float((a.t_cam_obj_m - b.t_cam_obj_m).norm(dim=1).max() * 1000)


def table_of(timed: dict[str, Timed]) -> Table:
    """A row for each stage and for all together; ratios of CPU seconds, exact over fast."""
    columns = [f"{name} {what}" for name in timed for what in ("cpu s", "wall s")]
    table = Table(["stage", *columns, "exact / fast"])

    def add(title: str, costs: dict[str, Cost]) -> None:
        figures = [figure for cost in costs.values() for figure in cost]
        table.add(title, *figures, costs["exact"].cpu_s / costs["fast"].cpu_s)

    for stage in sorted(timed["exact"].runs[0].cpu_s, key=[REST].count):
        add(stage, {name: of.stage(stage) for name, of in timed.items()})
    add("all", {name: of.whole() for name, of in timed.items()})
    add("all, at best", {name: of.whole(choose=min) for name, of in timed.items()})
    return table


def verdict(timed: dict[str, Timed], threads: int) -> dict[str, Any]:
    """What the batch's figures come to."""
    exact, fast = timed["exact"].whole(), timed["fast"].whole()
    batch = timed["fast"].batch
    return {
        "batch": batch,
        "threads": threads,
        "ratio_cpu": exact.cpu_s / fast.cpu_s,
        "ratio_wall": exact.wall_s / fast.wall_s,
        "exact_cpu_s": exact.cpu_s * batch,
        "fast_cpu_s": fast.cpu_s * batch,
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
        settings: dict[str, Run] = {
            name: Setting(network, seen, options.threads).run for name, network in (("exact", exact), ("fast", fast))
        }
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
        print(f"fast's poses differ from exact's by at most {difference[0]:.2g} degrees and {difference[1]:.2g} mm")
        print(
            f"exact takes {came_to['ratio_cpu']:.1f} times fast's CPU seconds ({came_to['ratio_wall']:.1f} times its "
            f"wall time) at batch {batch} on {threads} threads; fast: {came_to['fast_cpu_s']:.1f} CPU s a batch"
        )


if __name__ == "__main__":
    main()
