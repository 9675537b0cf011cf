"""The input and output of a solver peer: two files of plain arrays. Needs numpy alone.

A job holds object models (meshes in metres) and cases: the points under a mask in the camera frame, and the model to
find among them. A peer prepares each model once, then answers case by case, timing both.

    peer's file:  run(Peer())     called as: python -m benchmarks.peers.NAME JOB.npz ANSWER.npz
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The questions."""

    vertices_m: dict[str, Array]  # by model: (V, 3) float32
    faces: dict[str, Array]  # by model: (F, 3) int32
    cases: list[tuple[str, Array]]  # model, and (N, 3) float32 points in the camera frame, metres


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answers, in the order of the cases."""

    T_cam_obj: Array  # (cases, 4, 4), metres; NaN = no pose
    seconds: Array  # (cases,)
    prepare_s: Array  # (models,)


class Peer(Protocol):
    """A solver: `prepare` once for each model, then `solve`."""

    def prepare(self, vertices_m: Array, faces: Array) -> Any:
        """Return the peer's own form of a model."""
        ...

    def solve(self, model: Any, points_m: Array) -> Array | None:
        """Return T_cam_obj (4, 4) of the model among points (N, 3), metres; None = not found."""
        ...


def write_job(path: Path, job: Job) -> None:
    """Write the job as one file without pickled objects."""
    names = list(job.vertices_m)
    arrays: dict[str, Any] = {"names": np.array(names), "cases": np.array([name for name, _ in job.cases])}
    for number, name in enumerate(names):
        arrays[f"vertices{number}"], arrays[f"faces{number}"] = job.vertices_m[name], job.faces[name]
    for number, (_, points_m) in enumerate(job.cases):
        arrays[f"points{number}"] = points_m
    np.savez(path, **arrays)


def read_job(path: Path) -> Job:
    """Read the job that `write_job` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        names = [str(name) for name in arrays["names"]]
        return Job(
            vertices_m={name: arrays[f"vertices{number}"] for number, name in enumerate(names)},
            faces={name: arrays[f"faces{number}"] for number, name in enumerate(names)},
            cases=[(str(name), arrays[f"points{number}"]) for number, name in enumerate(arrays["cases"])],
        )


def read_answer(path: Path) -> Answer:
    """Read the answer that a peer wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Answer(**{name: arrays[name] for name in ("T_cam_obj", "seconds", "prepare_s")})


def run(peer: Peer) -> None:
    """Run a peer's process: read the job, prepare, solve, write the answer."""
    parser = argparse.ArgumentParser(description=(peer.__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path, help="file written by benchmarks.accuracy.run")
    parser.add_argument("answer", type=Path, help="file to write")
    options = parser.parse_args()

    job = read_job(options.job)
    models: dict[str, Any] = {}
    prepare_s = []
    for name, vertices_m in job.vertices_m.items():
        begun = time.perf_counter()
        models[name] = peer.prepare(vertices_m, job.faces[name])
        prepare_s.append(time.perf_counter() - begun)
    poses = np.full((len(job.cases), 4, 4), np.nan)
    seconds = np.zeros(len(job.cases))
    for number, (name, points_m) in enumerate(job.cases):
        begun = time.perf_counter()
        found = peer.solve(models[name], points_m) if len(points_m) else None
        seconds[number] = time.perf_counter() - begun
        if found is not None:
            poses[number] = found
        print(f"{number + 1}/{len(job.cases)}", file=sys.stderr, flush=True)
    np.savez(options.answer, T_cam_obj=poses, seconds=seconds, prepare_s=np.array(prepare_s))


def surface_points(vertices_m: Array, faces: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Return `count` points evenly over a mesh's surface, (count, 3) float64, and their unit normals (the faces')."""
    rng = np.random.default_rng(seed)
    corners = vertices_m[faces].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(normals, axis=1)
    chosen = rng.choice(len(faces), size=count, p=areas / areas.sum())
    a, b = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    points = (1 - a) * corners[chosen, 0] + a * (1 - b) * corners[chosen, 1] + a * b * corners[chosen, 2]
    return points, normals[chosen] / areas[chosen, None]
