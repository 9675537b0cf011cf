"""Further studies of the accuracy benchmark: masks of other objects, tracking, real frames, memory, batches."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.cases import SURE, Ask, Bench, Case, Frame, Row, batches, cut, reference
from benchmarks.accuracy.tables import mean, percentile, share
from benchmarks.peers.job import surface_points
from pem.bench.report import Table
from posekit.engine import Engine, Estimate, Float64, Instance, ObjectModel, Outcome, Rejection, Symmetries
from posekit.io import images, meshes
from posekit.synthetic.scenes import pose_errors
from posekit.synthetic.shapes import Shape, rotation

ROOT = Path(__file__).parents[2]
ALIKE = 1.15  # shapes whose spreads differ by a smaller factor may be (nearly) one shape in two colours
SHIFT_MM, TURN_DEG = 5.0, 5.0  # between one frame and the next
BATCHES = (1, 8, 64)

Tell = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------- wrong objects


def other_shapes(shapes: Sequence[Shape]) -> dict[str, list[str]]:
    """Return for each shape those it cannot be mistaken for: their spreads differ, whatever their colour or frame."""
    spreads = {shape.name: _spread(shape) for shape in shapes}
    return {
        name: [other for other, theirs in spreads.items() if np.abs(np.log(own / theirs)).max() > np.log(ALIKE)]
        for name, own in spreads.items()
    }


def _spread(shape: Shape) -> Float64:
    """Return the surface's extent along its three main directions, (3,): standard deviations in metres, ascending."""
    points, _ = surface_points(shape.mesh.vertices_m, shape.mesh.faces, 4000, seed=0)
    return np.asarray(np.sqrt(np.linalg.eigvalsh(np.cov(points.T))) + 1e-4, dtype=np.float64)


def run_wrong(bench: Bench, qualities: Sequence[str], seed: int, tell: Tell) -> list[Row]:
    """Ask for every mask with an object that it does not show."""
    rng = np.random.default_rng(seed)
    others = other_shapes([bench.accuracy_set.shapes[name] for name in bench.models])
    rows: list[Row] = []
    for quality in qualities:
        for scene in range(len(bench.frames)):
            cases = [
                dataclasses.replace(case, asked=str(rng.choice(others[case.object])))
                for case in bench.cases(quality, scene)
                if others[case.object]
            ]
            if cases:
                outcomes, seconds = bench.ask(bench.cut(cases))
                rows += [bench.row(case, found, seconds) for case, found in zip(cases, outcomes, strict=True)]
            tell(f"other objects' masks, {quality}, scene {scene + 1} of {len(bench.frames)}")
    return rows


def wrong_table(rows: Sequence[Row]) -> Table:
    """Tabulate how masks without the object are answered, by quality of mask."""
    table = Table(["masks", "questions", "rejected", "sure", "share sure", "median confidence", "s median"])
    qualities = list(dict.fromkeys(row.quality for row in rows))
    groups = [(quality, [row for row in rows if row.quality == quality]) for quality in qualities]
    for name, some in [*groups, ("all", list(rows))] if len(groups) > 1 else groups:
        sure = sum(row.confidence > SURE for row in some)
        table.add(
            name,
            len(some),
            sum(row.status != "ok" for row in some),
            sure,
            share(sure, len(some)),
            percentile([row.confidence for row in some], 50),
            percentile([row.seconds for row in some], 50),
        )
    return table


# ------------------------------------------------------------------------------------------------------------ tracking


def disturbed(T_cam_obj: Float64, middle_m: Float64, rng: np.random.Generator) -> Float64:
    """Move a pose (4, 4) by SHIFT_MM and turn it by TURN_DEG about the object's middle (3,), in random directions."""
    axis, way = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 3)))
    R = rotation(axis.tolist(), TURN_DEG)
    about = T_cam_obj[:3, :3] @ middle_m + T_cam_obj[:3, 3]
    T = T_cam_obj.copy()
    T[:3, :3] = R @ T_cam_obj[:3, :3]
    T[:3, 3] = about + R @ (T_cam_obj[:3, 3] - about) + way * SHIFT_MM / 1000
    return T


def run_tracking(bench: Bench, quality: str, seed: int, tell: Tell) -> tuple[list[Row], list[Row]]:
    """Refine disturbed true poses without search; return the rows of the disturbed poses, and of the answers."""
    rng = np.random.default_rng(seed)
    before: list[Row] = []
    after: list[Row] = []
    for scene, pictures in enumerate(bench.accuracy_set.scenes):
        cases = bench.cases(quality, scene)
        starts = []
        for truth in pictures.instances:
            vertices = truth.shape.mesh.vertices_m.astype(np.float64)
            starts.append(disturbed(truth.T_cam_obj, (vertices.min(axis=0) + vertices.max(axis=0)) / 2, rng))
        if cases:
            outcomes, seconds = bench.ask(bench.cut(cases, starts))
            before += [bench.posed(case, T, 0.0) for case, T in zip(cases, starts, strict=True)]
            after += [bench.row(case, found, seconds) for case, found in zip(cases, outcomes, strict=True)]
        tell(f"tracking, scene {scene + 1} of {len(bench.frames)}")
    return before, after


def tracking_table(before: Sequence[Row], after: Sequence[Row]) -> Table:
    """Tabulate the disturbed poses, and the refined ones."""
    table = Table(["tracking", "instances", "AR", "right", "MSSD mm", "mm", "deg", "ms median", "ms p90"])
    for name, rows in (("start", before), ("refined", after)):
        posed = [row for row in rows if row.status == "ok"]
        table.add(
            name,
            len(rows),
            mean(row.ar for row in rows),
            share(sum(row.right for row in rows), len(rows)),
            percentile([row.mssd_mm or 0.0 for row in posed], 50),
            percentile([row.shift_mm or 0.0 for row in posed], 50),
            percentile([row.angle_deg or 0.0 for row in posed], 50),
            percentile([row.seconds * 1000 for row in rows], 50) if name == "refined" else "",
            percentile([row.seconds * 1000 for row in rows], 90) if name == "refined" else "",
        )
    return table


# --------------------------------------------------------------------------------------------------------- real frames

_HALF_TURN_ABOUT_Z = np.diag([-1.0, -1.0, 1.0, 1.0])

#: Facts missing in a model's file: a bottle without its label looks the same from behind.
REAL_SYMMETRIES = {"ycbv_mustard": Symmetries(discrete=(_HALF_TURN_ABOUT_Z,))}


@dataclass(frozen=True, kw_only=True)
class RealFrame:
    """A folder with rgb.png, depth.png, camera.json (cam_K, depth_scale), gt.json (obj, mask, R, t_mm), mask, mesh."""

    name: str
    frame: Frame
    mask: Any  # (H, W) bool
    shape: Shape
    T_cam_obj: Float64  # (4, 4), metres: the reference


def real_frames(folder: Path) -> list[RealFrame]:
    """Read every frame below a folder; an empty list if there is no such folder."""
    return [_real_frame(path.parent) for path in sorted(folder.glob("*/gt.json"))]


def _real_frame(folder: Path) -> RealFrame:
    camera = json.loads((folder / "camera.json").read_text())
    truth = json.loads((folder / "gt.json").read_text())[0]
    T = np.eye(4)
    T[:3, :3] = np.reshape(truth["R"], (3, 3))
    T[:3, 3] = np.array(truth["t_mm"]) / 1000
    raw = meshes.load_mesh({truth["obj"]: (folder / truth["obj"]).read_bytes()}, "ply", max_faces=2_000_000)
    symmetries = REAL_SYMMETRIES.get(folder.name, Symmetries())
    mask = images.decode_png((folder / truth["mask"]).read_bytes())
    return RealFrame(
        name=folder.name,
        frame=Frame(
            rgb=(folder / "rgb.png").read_bytes(),
            depth=(folder / "depth.png").read_bytes(),
            depth_scale_mm=camera["depth_scale"],
            K=np.reshape(camera["cam_K"], (3, 3)).astype(np.float64),
        ),
        mask=mask.reshape(*mask.shape[:2], -1)[..., 0] > 0,
        shape=Shape(name=folder.name, mesh=meshes.to_mesh(raw, "mm"), symmetries=symmetries),
        T_cam_obj=T,
    )


def run_real(engine: Engine, frames: Sequence[RealFrame], tell: Tell) -> Table:
    """Make one line for each frame: errors against its reference, as they are and modulo the object's symmetries."""
    table = Table(["real frame", "mm", "deg", "deg as it is", "confidence", "ambiguous", "s", "onboarding s", "status"])
    for one in frames:
        tell(f"real frame {one.name}")
        begun = time.perf_counter()
        model = engine.onboard(one.name, one.shape.mesh, None, lambda share: None)
        onboarding_s = time.perf_counter() - begun
        (ask,), _ = cut(one.frame, [one.mask], [reference(one.name, one.shape)])
        begun = time.perf_counter()
        outcome = engine.estimate([ask], {one.name: model})[0] if isinstance(ask, Instance) else ask
        seconds = time.perf_counter() - begun
        if isinstance(outcome, Rejection):
            table.add(one.name, *[float("nan")] * 3, 0.0, False, seconds, onboarding_s, outcome.code)
            continue
        angle_deg, shift_mm = pose_errors(outcome.T_cam_obj, one.T_cam_obj, one.shape.symmetries)
        plain_deg, _ = pose_errors(outcome.T_cam_obj, one.T_cam_obj, Symmetries())
        table.add(
            *(one.name, shift_mm, angle_deg, plain_deg, outcome.confidence, outcome.ambiguous),
            *(seconds, onboarding_s, "ok"),
        )
    return table


# -------------------------------------------------------------------------------------------------------------- memory


def memory(
    models: dict[str, ObjectModel], instances: Sequence[Instance], device: str, threads: int
) -> dict[str, float]:
    """Measure the resident memory in MB of a fresh process with only these models: loaded, and peak during a pass."""
    stored = {name: dataclasses.replace(model, data={}) for name, model in models.items()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy.memory", device, str(threads)],
        input=pickle.dumps((stored, list(instances))),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


# ------------------------------------------------------------------------------------------------------------- batches


def run_batches(bench: Bench, quality: str, peer: Engine, tell: Tell, sizes: Sequence[int] = BATCHES) -> Table:
    """Measure poses a second of `bench.engine` with several batch sizes, beside those of `peer`, one at a time.

    The largest differences to the peer's poses are modulo the objects' symmetries. Answers that only one of the two
    gives are counted.
    """
    asks: list[Ask] = []
    cases: list[Case] = []
    for scene in range(len(bench.frames)):
        own = bench.cases(quality, scene)
        if own:
            cases += own
            asks += bench.cut(own)
    kept = [(case, ask) for case, ask in zip(cases, asks, strict=True) if isinstance(ask, Instance)]
    instances = [ask for _, ask in kept]
    table = Table(["device", "batch", "instances", "poses/s", "vs. cpu", "most deg", "most mm", "other status"])

    def timed(engine: Engine, size: int) -> tuple[list[Outcome], float]:
        tell(f"{engine.device}, batches of {size}")
        engine.estimate(instances[:size], bench.models)  # allocates memory and kernels of this size
        begun = time.perf_counter()
        found = [out for some in batches(instances, size) for out in engine.estimate(some, bench.models)]
        return found, len(found) / (time.perf_counter() - begun)

    expected, peer_rate = timed(peer, 1)
    table.add(f"{peer.device} (peer)", 1, len(instances), peer_rate, 1.0, 0.0, 0.0, 0)
    for size in sizes:
        found, rate = timed(bench.engine, size)
        most_deg = most_mm = 0.0
        other = 0
        for (case, _), ours, theirs in zip(kept, found, expected, strict=True):
            if isinstance(ours, Estimate) and isinstance(theirs, Estimate):
                symmetries = bench.accuracy_set.shapes[case.object].symmetries
                angle_deg, shift_mm = pose_errors(ours.T_cam_obj, theirs.T_cam_obj, symmetries)
                most_deg, most_mm = max(most_deg, angle_deg), max(most_mm, shift_mm)
            else:
                other += type(ours) is not type(theirs)
        table.add(bench.engine.device, size, len(instances), rate, rate / peer_rate, most_deg, most_mm, other)
    return table
