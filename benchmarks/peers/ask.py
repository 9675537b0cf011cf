"""The benchmark's side of solver peers: ask a peer in its own environment, and score its answers."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy.cases import Ask, Bench, Case, Row
from benchmarks.accuracy.tables import mean, percentile, share
from benchmarks.peers.environment import PYTHON, ROOT, PeerFailed
from benchmarks.peers.job import Answer, Job, read_answer, write_job
from pem.bench.report import Table
from posekit.engine import Float32, Float64, Rejection
from posekit.render import depth_to_points

PEERS = {"open3d": "open3d_fpfh", "opencv": "opencv_ppf"}
TITLES = {"open3d": "Open3D FPFH + RANSAC + ICP", "opencv": "OpenCV PPF + ICP"}


def ask(name: str, job: Job, threads: int, python: Path = PYTHON) -> Answer:
    """Run one peer over a job in a process of its own; raise PeerFailed if it fails."""
    if not python.exists():
        raise PeerFailed(f"{python} does not exist; `make peers` sets the peers' environment up")
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "job.npz", Path(folder) / "answer.npz"
        write_job(question, job)
        done = subprocess.run(
            [str(python), "-m", f"benchmarks.peers.{PEERS[name]}", str(question), str(answer)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise PeerFailed(f"{PEERS[name]} ended with {done.returncode}: {done.stderr[-2000:]}")
        return read_answer(answer)


def compare(
    bench: Bench, rows: Sequence[Row], names: Sequence[str], count: int, threads: int, tell: Callable[[str], None]
) -> Table:
    """Compare the engine and its peers on the same `count` masks of each quality; `vs.`: peer seconds over engine's."""
    qualities = list(dict.fromkeys(row.quality for row in rows))
    groups = {quality: spread([row for row in rows if row.quality == quality], count) for quality in qualities}
    asked = [row for group in groups.values() for row in group]
    table = Table(["solver", "masks", "instances", "AR", "right", "s median", "vs.", "onboarding s"])

    def add(title: str, found: Sequence[Row], onboarding_s: Sequence[float]) -> None:
        for quality in qualities:
            theirs = [row for row in found if row.quality == quality]
            ours_s = percentile([row.seconds for row in asked if row.quality == quality], 50)
            seconds = percentile([row.seconds for row in theirs], 50)
            table.add(
                title,
                quality,
                len(theirs),
                mean(row.ar for row in theirs),
                share(sum(row.right for row in theirs), len(theirs)),
                seconds,
                seconds / ours_s,
                percentile(list(onboarding_s), 50),
            )

    objects = list(dict.fromkeys(row.asked for row in asked))
    add("this engine", asked, [bench.onboarding_s[name] for name in objects])
    cases = [Case(**{name: getattr(row, name) for name in Case.__dataclass_fields__}) for row in asked]
    job = Job(
        vertices_m={name: bench.accuracy_set.shapes[name].mesh.vertices_m for name in objects},
        faces={name: bench.accuracy_set.shapes[name].mesh.faces for name in objects},
        cases=[(case.asked, _masked_points(*bench.cut([case]))) for case in cases],
    )
    for name in names:
        tell(f"peers: {TITLES[name]}")
        answer = ask(name, job, threads)
        outcomes = zip(cases, answer.T_cam_obj, answer.seconds, strict=True)
        add(
            TITLES[name],
            [_row(bench, case, T, float(seconds)) for case, T, seconds in outcomes],
            answer.prepare_s.tolist(),
        )
    return table


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` of the rows, evenly spread; all rows if there are no more."""
    if count >= len(rows):
        return list(rows)
    return [rows[int(place)] for place in np.linspace(0, len(rows) - 1, count).round()]


def _masked_points(ask: Ask) -> Float32:
    """Return the points under an instance's mask, (N, 3) in the camera frame; none if the mask cannot be used."""
    if isinstance(ask, Rejection):
        return np.zeros((0, 3), np.float32)
    points = depth_to_points(ask.depth_m, ask.K)
    return np.ascontiguousarray(points[ask.mask & (ask.depth_m > 0)])


def _row(bench: Bench, case: Case, T_cam_obj: Float64, seconds: float) -> Row:
    if np.isfinite(T_cam_obj).all():
        return bench.posed(case, T_cam_obj, seconds)
    return bench.row(case, Rejection(code="no_fit", detail="the peer found no pose"), seconds)
