"""Run the accuracy benchmark through a running service: the client's answers, and how long it waits for them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.accuracy.cases import SEED, Bench, Case, Row
from benchmarks.accuracy.memory import resident_mb
from benchmarks.running import own
from pem import rle
from pem.bench.report import Table
from pem.client import Client, Pose
from posekit.engine import Rejection
from posekit.synthetic.scenes import pose_errors
from posekit.synthetic.shapes import mesh_to_ply
from posekit.units import transform_mm_to_m

REQUEST = 5  # instances of a timed request
TIMED_REQUESTS = 5, 20  # at least, at most; between them, the number of scenes
STAGES = ("decode_ms", "queue_ms", "pose_ms", "respond_ms", "total_ms")
ANSWER_LIMIT_S = 300.0

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Service:
    """The measurements of a service at its client."""

    rows: list[Row]  # `seconds`: of the request, divided by its instances
    onboarding_s: dict[str, float]  # from the upload until the object can be used
    stages: Table  # time per stage of a request of REQUEST instances
    median_s: float  # seconds per instance of such a request, all stages, at the client
    worker_mb: float  # memory of the pose worker with all objects loaded
    most_deg: float  # largest difference to the library's answers, modulo symmetries
    most_mm: float


def run_service(
    bench: Bench, library: Sequence[Row], qualities: Sequence[str], device: str, threads: int, tell: Tell
) -> Service:
    """Start a server, register the objects, ask for every mask, time requests of REQUEST instances, stop the server."""
    settings = {"device": device, "pose_threads": threads}
    with tempfile.TemporaryDirectory() as folder, own(Path(folder) / "data", settings) as server:
        with Client(server.url, "", timeout_s=ANSWER_LIMIT_S, deadline_s=ANSWER_LIMIT_S) as client:
            onboarding_s = {}
            for name in bench.models:
                tell(f"service: onboarding {name}")
                begun = time.perf_counter()
                client.objects.add(mesh_to_ply(bench.accuracy_set.shapes[name].mesh), cad_format="ply", name=name)
                onboarding_s[name] = time.perf_counter() - begun
            rows: list[Row] = []
            for quality in qualities:
                for scene in range(len(bench.frames)):
                    tell(f"service: {quality} masks, scene {scene + 1} of {len(bench.frames)}")
                    rows += _answers(bench, client, quality, scene)
            tell(f"service: requests of {REQUEST} instances")
            stages, median_s = _stages(bench, client, qualities[0])
        worker_mb = max(resident_mb(worker.pid) for worker in server.workers("pose"))
    most_deg, most_mm = _difference(bench, library, rows)
    return Service(
        rows=rows,
        onboarding_s=onboarding_s,
        stages=stages,
        median_s=median_s,
        worker_mb=worker_mb,
        most_deg=most_deg,
        most_mm=most_mm,
    )


def _answers(bench: Bench, client: Client, quality: str, scene: int) -> list[Row]:
    """Ask for every mask of a scene in one request."""
    cases = bench.cases(quality, scene)
    if not cases:
        return []
    masks = [bench.accuracy_set.masks[quality][scene][case.index] for case in cases]
    begun = time.perf_counter()
    poses = _estimate(bench, client, scene, [rle.encode_rle(mask) for mask in masks], [case.asked for case in cases])[0]
    seconds = (time.perf_counter() - begun) / len(cases)
    return [_row(bench, case, pose, seconds) for case, pose in zip(cases, poses, strict=True)]


def _stages(bench: Bench, client: Client, quality: str) -> tuple[Table, float]:
    """Measure the time per stage of a request of REQUEST instances; scenes with fewer have some of them asked twice."""
    found: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "client_ms")}
    scenes = [scene for scene in range(len(bench.frames)) if bench.cases(quality, scene)]
    least, most = TIMED_REQUESTS
    for number in range(min(max(len(scenes), least), most)):
        scene = scenes[number % len(scenes)]
        cases = bench.cases(quality, scene)
        picked = [cases[index % len(cases)] for index in range(REQUEST)]
        masks = [rle.encode_rle(bench.accuracy_set.masks[quality][scene][case.index]) for case in picked]
        begun = time.perf_counter()
        _, timing = _estimate(bench, client, scene, masks, [case.asked for case in picked])
        found["client_ms"].append((time.perf_counter() - begun) * 1000)
        for stage in STAGES:
            found[stage].append(getattr(timing, stage))
    table = Table([f"{REQUEST} instances", "ms a request", "ms an instance"])
    for stage, values in found.items():
        median = statistics.median(values)
        table.add(stage.removesuffix("_ms"), round(median) if median >= 100 else median, median / REQUEST)
    return table, statistics.median(found["client_ms"]) / REQUEST / 1000


def _estimate(
    bench: Bench, client: Client, scene: int, masks: Sequence[rle.Rle], names: Sequence[str]
) -> tuple[list[Pose], Any]:
    frame = bench.frames[scene]
    result = client.estimate(
        frame.rgb,
        frame.depth,
        frame.K,
        list(masks),
        object_ids=list(names),
        objects={name: name for name in names},
        depth_scale=frame.depth_scale_mm,
        seed=SEED,
    )
    return result.poses, result.timing


def _row(bench: Bench, case: Case, pose: Pose, seconds: float) -> Row:
    """Score an answered row as the library's are scored."""
    if not pose.ok:
        code, detail = (pose.error.code, pose.error.detail) if pose.error else (pose.status, "")
        return bench.row(case, Rejection(code=code, detail=detail), seconds)
    row = bench.posed(case, transform_mm_to_m(pose.T_cam_obj_mm), seconds)
    row.confidence, row.ambiguous = pose.confidence, pose.ambiguous
    row.evidence = msgspec.structs.asdict(pose.evidence) if pose.evidence else {}
    return row


def _difference(bench: Bench, library: Sequence[Row], service: Sequence[Row]) -> tuple[float, float]:
    """Return the largest difference (degrees, mm) between two runs' poses of the same masks, modulo symmetries."""
    theirs = {(row.quality, row.scene, row.index): row for row in library}
    most_deg = most_mm = 0.0
    for row in service:
        other = theirs[row.quality, row.scene, row.index]
        if row.T_cam_obj is not None and other.T_cam_obj is not None:
            symmetries = bench.accuracy_set.shapes[row.object].symmetries
            angle_deg, shift_mm = pose_errors(np.array(row.T_cam_obj), np.array(other.T_cam_obj), symmetries)
            most_deg, most_mm = max(most_deg, angle_deg), max(most_mm, shift_mm)
    return most_deg, most_mm
