"""The geometric engine: search on the distance field, refine, verify, and answer with evidence."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from posekit.engine import (
    Estimate,
    Evidence,
    Float32,
    Float64,
    Hypothesis,
    Instance,
    Mesh,
    ObjectModel,
    Outcome,
    Progress,
    Rejection,
    Symmetries,
)
from posekit.geometric import VERSION, onboard
from posekit.geometric.compare import Comparison, compare, decided, likelihood, margins
from posekit.geometric.kernels import distinct
from posekit.geometric.model import Prepared, Shelf, prepare
from posekit.geometric.observe import FARTHEST_M, SEED_POINTS, Cleaned, Observations, clean, together
from posekit.geometric.poses import Poses
from posekit.geometric.refine import polish, refine
from posekit.geometric.score import score, tolerance_m
from posekit.geometric.search import search
from posekit.geometric.symmetry import pose_difference
from posekit.geometry import nearest_rotation

NO_FIT = 0.01  # poses with less confidence are not answered
COMPARED = 8  # poses drawn and compared with the picture
RIVAL_DEG = 10.0  # a runner-up this far away, modulo symmetries, is a different answer
RIVAL_SHARE = 0.1  # so is one this far away, as a share of the diameter
UNDECIDED = 3.0  # two answers with a smaller margin between them are ambiguous
MOST_TOGETHER = 64  # instances in one pass on a GPU


class GeometricEngine:
    """The engine without weights; implements `posekit.engine.Engine`.

    On a GPU, instances of different objects and requests share every step. On a CPU, each instance is computed by
    itself, several at a time, so that its answer has the same bits alone and in a batch.
    """

    name = "geometric"
    version = VERSION

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        """`device` is named as in torch. `threads`: instances computed at a time on a CPU, None = one for each core.

        On a CPU this sets torch to one thread, for the whole process.
        """
        self.device = device
        count = len(os.sched_getaffinity(0)) if threads is None else threads
        self._pool = None
        if torch.device(device).type == "cpu":
            torch.set_num_threads(1)  # threads pay better across instances than within one
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="pose") if count > 1 else None

    def onboard(self, object_id: str, mesh: Mesh, symmetries: Symmetries | None, progress: Progress) -> ObjectModel:
        """Sample the surface, build its field and views, find its symmetries (unless `symmetries` are declared)."""
        diameter_m, found, arrays = onboard.build(mesh, symmetries, progress)
        return ObjectModel(
            object_id=object_id,
            engine=self.name,
            engine_version=self.version,
            diameter_m=diameter_m,
            symmetries=found,
            arrays=arrays,
        )

    def practice_model(self, object_id: str, mesh: Mesh) -> ObjectModel:
        """Return the full model: it takes no more than a second."""
        return self.onboard(object_id, mesh, None, lambda _: None)

    def prepare(self, model: ObjectModel) -> int:
        """Put a model's tensors onto the device once, and return the bytes they take."""
        return self._prepared(model).nbytes

    def estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        """Return one outcome per instance, in order."""
        if torch.device(self.device).type == "cpu":
            run = map if self._pool is None else self._pool.map
            return [outcomes[0] for outcomes in run(lambda instance: self._estimate([instance], models), instances)]
        return self._estimate(instances, models)

    @torch.inference_mode()
    def _estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        tasks: list[_Task] = []
        for index, instance in enumerate(instances):
            stored = models.get(instance.object_id)
            if stored is None:
                detail = f"no model of object {instance.object_id} is loaded"
                outcomes[index] = Rejection(code="no_cad", detail=detail)
                continue
            model = self._prepared(stored)
            cleaned = clean(instance, model.diameter_m)
            if isinstance(cleaned, Rejection):
                outcomes[index] = cleaned
            else:
                tasks.append(_Task(index, instance, model, cleaned, _start(instance)))
        tasks.sort(key=lambda task: task.kind)
        for kind, alike in groupby(tasks, key=lambda task: task.kind):
            for group in _portions(list(alike), MOST_TOGETHER):
                for task, outcome in zip(group, _solve(group, kind), strict=True):
                    outcomes[task.index] = outcome
        return [outcomes[index] for index in range(len(instances))]

    def _prepared(self, model: ObjectModel) -> Prepared:
        key = f"{self.name}:{self.device}"
        if key not in model.data:
            model.data[key] = prepare(model, torch.device(self.device))
        prepared: Prepared = model.data[key]
        return prepared


class _Kind(NamedTuple):
    """The properties that the instances of one pass share."""

    started: bool  # starts from the client's pose, without a search
    refined: bool
    parts: int  # number of parts of the mask; each gets its share of the hypotheses


@dataclass(frozen=True)
class _Task:
    """An instance that passed its checks."""

    index: int
    instance: Instance
    model: Prepared
    cleaned: Cleaned
    start_T_cam_obj: Float64 | None  # the client's pose with a proper rotation; None = search

    @property
    def kind(self) -> _Kind:
        return _Kind(self.start_T_cam_obj is not None, self.instance.refine == "icp", len(self.cleaned.members))


def _start(instance: Instance) -> Float64 | None:
    T = instance.init_T_cam_obj
    if T is None or not np.isfinite(T).all() or abs(np.linalg.det(T[:3, :3])) < 1e-6:
        return None
    if np.abs(T[:3, 3]).max() > FARTHEST_M:
        return None
    start = np.array(T, dtype=np.float64)
    start[:3, :3] = nearest_rotation(torch.from_numpy(start[:3, :3])).numpy()
    return start


def _portions(tasks: list[_Task], size: int) -> Iterator[list[_Task]]:
    for first in range(0, len(tasks), size):
        yield tasks[first : first + size]


def _solve(tasks: Sequence[_Task], kind: _Kind) -> list[Outcome]:
    """Solve instances of one kind together."""
    shelf = Shelf.of([task.model for task in tasks])
    observations = together([task.cleaned for task in tasks], shelf.diameter_m)
    if kind.started:
        poses = _sharpen(shelf, observations, _starts(tasks))
    else:
        poses, part = search(shelf, observations)
        if kind.refined:
            poses = _sharpen(shelf, observations, poses)
        total = score(shelf, observations, poses, part, points=SEED_POINTS, visible=256, colour=True)
        poses = poses.pick(distinct(poses, total, COMPARED, 3.0, 0.02 * shelf.diameter_m))
    if kind.started or kind.refined:
        poses = polish(shelf, observations, poses)
    comparison = compare(shelf, observations, poses)
    return _answers(tasks, poses, comparison)


def _starts(tasks: Sequence[_Task]) -> Poses:
    """Return the clients' poses in the centred frame, one hypothesis per instance."""
    device = tasks[0].model.centre_m.device
    T = torch.from_numpy(np.stack([task.start_T_cam_obj for task in tasks if task.start_T_cam_obj is not None]))
    centre = torch.stack([task.model.centre_m for task in tasks]).double().cpu()
    t = T[:, :3, 3] + (T[:, :3, :3] @ centre[..., None])[..., 0]
    return Poses(T[:, None, :3, :3].float().to(device), t[:, None].float().to(device))


def _sharpen(shelf: Shelf, observations: Observations, poses: Poses) -> Poses:
    d = shelf.diameter_m
    tolerance = tolerance_m(shelf, observations)
    narrow = [torch.maximum(2 * tolerance, 0.03 * d)] * 2 + [1.5 * tolerance] * 4
    return refine(
        shelf, observations, poses, points=384, visible=192,
        reach_m=[0.08 * d, 0.06 * d, 0.05 * d, 0.04 * d, *narrow], through_m=2 * tolerance,
    )  # fmt: skip


def _answers(tasks: Sequence[_Task], poses: Poses, comparison: Comparison) -> list[Outcome]:
    """Choose among the poses of each instance. The numbers are few, so this runs on the CPU in double precision."""
    R = nearest_rotation(poses.R.double().cpu())
    centre = torch.stack([task.model.centre_m for task in tasks]).double().cpu()
    t = poses.t.double().cpu() - (R @ centre[:, None, :, None])[..., 0]
    T = np.tile(np.eye(4), (*t.shape[:2], 1, 1))
    T[..., :3, :3] = R.numpy()
    T[..., :3, 3] = t.numpy()
    best = comparison.cost.argmin(dim=1)
    tables = {
        "cost": comparison.cost,
        "margin": margins(comparison, best),
        "likely": likelihood(comparison),
        "inliers": comparison.inliers,
        "residual_m": comparison.residual_m,
        "overlap": comparison.overlap,
        "through": comparison.through,
    }
    on_cpu = {name: values.cpu().numpy() for name, values in tables.items()}
    return [
        _answer(task, list(T[row]), {name: values[row] for name, values in on_cpu.items()})
        for row, task in enumerate(tasks)
    ]


def _answer(task: _Task, T: list[Float64], table: dict[str, Float32]) -> Outcome:
    order = np.argsort(table["cost"], kind="stable").tolist()
    best = order[0]
    likely = float(table["likely"][best])
    if likely < NO_FIT:
        return Rejection(code="no_fit", detail=_why_not(float(table["inliers"][best]), float(table["overlap"][best])))
    rivals: list[int] = []
    for index in order[1:]:
        if all(_apart(T[index], T[other], task.model) for other in [best, *rivals]):
            rivals.append(index)
    margin = min((float(table["margin"][index]) for index in rivals), default=math.inf)
    sure = likely * decided(margin)
    runners_up = [
        Hypothesis(
            T_cam_obj=T[index],
            confidence=min(float(table["likely"][index]) * (1 - decided(float(table["margin"][index]))), sure),
        )
        for index in rivals
    ]
    runners_up.sort(key=lambda other: other.confidence, reverse=True)
    return Estimate(
        T_cam_obj=T[best],
        confidence=sure,
        evidence=Evidence(
            inlier_fraction=float(table["inliers"][best]),
            residual_mm=float(table["residual_m"][best]) * 1000,
            visible_overlap=float(table["overlap"][best]),
            free_space_violation=float(table["through"][best]),
        ),
        ambiguous=margin < UNDECIDED,
        hypotheses=tuple(runners_up[: task.instance.hypotheses]),
    )


def _apart(T_a: Float64, T_b: Float64, model: Prepared) -> bool:
    """Return True if two poses T_cam_obj (4, 4) are different answers, modulo symmetries."""
    angle_deg, _ = pose_difference(T_a, T_b, model.symmetries)
    centre = np.append(model.centre_m.double().cpu().numpy(), 1.0)
    moved_m = float(np.linalg.norm(((T_a - T_b) @ centre)[:3]))
    return angle_deg > RIVAL_DEG or moved_m > RIVAL_SHARE * model.diameter_m


def _why_not(inliers: float, overlap: float) -> str:
    return (
        f"the best pose explains {inliers:.0%} of the points under the mask and {overlap:.0%} of the surface that "
        f"should be visible: check that mask, CAD and depth belong to the same object"
    )
