"""The geometric engine: search on the distance field, refine, verify, answer with evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from posekit.engine import (
    Estimate,
    Evidence,
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
from posekit.geometric import onboard
from posekit.geometric.model import Prepared, prepare
from posekit.geometric.observe import Observation, observe
from posekit.geometric.refine import Poses, refine
from posekit.geometric.search import search
from posekit.geometric.symmetry import pose_difference
from posekit.geometric.verify import Scores, confidence, score, tolerance_m
from posekit.geometry import nearest_rotation

NO_FIT = 0.02  # confidence at which there is nothing to stand for
RIVAL_DEG = 15.0  # a runner-up this far away, modulo symmetries, is another answer
RIVAL_SHARE = 0.98  # of the winner's score: as good as the winner


class GeometricEngine:
    """Engine without weights (`posekit.engine.Engine`).

    Instances are worked on one after the other with the same shapes whatever their number, so that an answer has the
    same bits alone and in company.
    """

    name = "geometric"
    version = "1"

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        """`device`: as torch names it. `threads`: torch's CPU threads for this process; None leaves them alone."""
        self.device = device
        if threads is not None:
            torch.set_num_threads(threads)

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

    def prepare(self, model: ObjectModel) -> int:
        """Put a model's tensors onto the device, once; returns the bytes they take."""
        return self._prepared(model).nbytes

    @torch.inference_mode()
    def estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        """One outcome per instance, in order."""
        return [self._solve(instance, models.get(instance.object_id)) for instance in instances]

    def _prepared(self, model: ObjectModel) -> Prepared:
        key = f"{self.name}:{self.device}"
        if key not in model.data:
            model.data[key] = prepare(model, torch.device(self.device))
        prepared: Prepared = model.data[key]
        return prepared

    def _solve(self, instance: Instance, stored: ObjectModel | None) -> Outcome:
        if stored is None:
            return Rejection(code="no_cad", detail=f"no model of object {instance.object_id} is loaded")
        model = self._prepared(stored)
        observation = observe(instance, model.diameter_m, torch.device(self.device))
        if isinstance(observation, Rejection):
            return observation
        start = _start(instance, model)
        poses = search(model, observation) if start is None else start
        if instance.refine == "icp" or start is not None:
            poses = _sharpen(model, observation, poses, fine=instance.refine == "icp")
        return _answer(instance, model, observation, poses)


def _start(instance: Instance, model: Prepared) -> Poses | None:
    """The client's pose in the centred frame, its rotation made one; None = search."""
    T = instance.init_T_cam_obj
    if T is None or not np.isfinite(T).all() or abs(np.linalg.det(T[:3, :3])) < 1e-6:
        return None
    device = model.centre_m.device
    T_cam_obj = torch.tensor(np.asarray(T, dtype=np.float64))
    R = nearest_rotation(T_cam_obj[:3, :3])
    t = T_cam_obj[:3, 3] + R @ model.centre_m.double().cpu()
    return Poses(R.float()[None].to(device), t.float()[None].to(device))


def _sharpen(model: Prepared, observation: Observation, poses: Poses, *, fine: bool) -> Poses:
    d = model.diameter_m
    tolerance = tolerance_m(model, observation)
    wide = [0.08 * d, 0.06 * d, 0.05 * d, 0.04 * d]
    narrow = [max(2 * tolerance, 0.03 * d)] * 2 + [1.5 * tolerance] * 4
    return refine(
        model, observation, poses, points=384, visible=192,
        reach_m=wide + narrow if fine else wide, tolerance_m=2 * tolerance,
    )  # fmt: skip


def _answer(instance: Instance, model: Prepared, observation: Observation, poses: Poses) -> Outcome:
    scores = score(model, observation, poses, points=512, visible=4096, colour=True, exact=True)
    order = torch.argsort(scores.total, descending=True, stable=True).cpu().tolist()
    sure = confidence(scores).cpu().tolist()
    total = scores.total.cpu().tolist()
    T = _object_poses(model, poses)
    best = order[0]
    if sure[best] < NO_FIT:
        return Rejection(code="no_fit", detail=_why_not(scores, best))

    rivals: list[int] = []
    for index in order[1:]:
        if all(_apart(T[index], T[other], model) for other in [best, *rivals]):
            rivals.append(index)
    share = max((total[index] / total[best] for index in rivals), default=0.0) if total[best] > 0 else 1.0
    ambiguous = share > RIVAL_SHARE
    doubt = 0.5 * min(max((share - 0.9) / 0.1, 0.0), 1.0)  # two answers alike: each is right half the time
    return Estimate(
        T_cam_obj=T[best],
        confidence=sure[best] * (1 - doubt),
        evidence=_evidence(scores, best),
        ambiguous=ambiguous,
        hypotheses=tuple(
            Hypothesis(
                T_cam_obj=T[index], confidence=sure[index] * min(max(total[index] / total[best], 0.0), 1.0) * 0.5
            )
            for index in rivals[: instance.hypotheses]
        ),
    )


def _object_poses(model: Prepared, poses: Poses) -> list[Float64]:
    """T_cam_obj (4, 4) of each pose, its rotation orthonormal in double precision."""
    R = nearest_rotation(poses.R.double().cpu())
    t = poses.t.double().cpu() - (R @ model.centre_m.double().cpu()[:, None])[..., 0]
    T = np.tile(np.eye(4), (len(poses), 1, 1))
    T[:, :3, :3] = R.numpy()
    T[:, :3, 3] = t.numpy()
    return list(T)


def _apart(T_a: Float64, T_b: Float64, model: Prepared) -> bool:
    """Whether two poses are different answers, modulo symmetries. T_cam_obj (4, 4) each."""
    angle_deg, _ = pose_difference(T_a, T_b, model.symmetries)
    centre = np.append(model.centre_m.double().cpu().numpy(), 1.0)
    moved_m = float(np.linalg.norm(((T_a - T_b) @ centre)[:3]))
    return angle_deg > RIVAL_DEG or moved_m > 0.15 * model.diameter_m


def _evidence(scores: Scores, index: int) -> Evidence:
    return Evidence(
        inlier_fraction=float(scores.inliers[index]),
        residual_mm=float(scores.residual_m[index]) * 1000,
        visible_overlap=float(scores.overlap[index]),
    )


def _why_not(scores: Scores, index: int) -> str:
    return (
        f"the best pose explains {float(scores.inliers[index]):.0%} of the points under the mask and "
        f"{float(scores.overlap[index]):.0%} of the surface that should be visible: check that mask, CAD and depth "
        f"belong to the same object"
    )
