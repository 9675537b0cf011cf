"""SAM-6D's network as an engine: it renders templates once for each object, then estimates poses of detections."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posekit.engine import (
    Estimate,
    Float32,
    Instance,
    Int32,
    Mesh,
    ObjectModel,
    Outcome,
    Progress,
    Rejection,
    Symmetries,
    UInt8,
)
from posekit.sam6d.checkpoint import weights
from posekit.sam6d.checkpoint.version import version_of
from posekit.sam6d.crops import NetworkInput, instance_input, template_input
from posekit.sam6d.evidence import evidence
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.whole import Description, Model, Network, Poses, Scene, together
from posekit.sam6d.quick.cpu import FastNetwork
from posekit.sam6d.quick.gpu import PRECISIONS, GpuNetwork, Runner, keep_float32
from posekit.sam6d.templates import View, render_views
from posekit.surface import diameter_of, sample_surface

PRACTICE_PX = 64
RENDERING = 0.1  # share of the onboarding time, for the progress


class Sam6dEngine:
    """SAM-6D's network; implements `posekit.engine.Engine`.

    On a CPU, each instance is computed by itself, several at a time, and its answer has the same bits whatever else is
    in the pass. On a GPU, all instances of a pass go through the network together.
    """

    name = "sam6d"

    def __init__(
        self,
        *,
        weights_file: Path,
        device: str = "cpu",
        threads: int | None = None,
        exact: bool = False,
        precision: str = "float32",
        views: int = Config.views,
    ) -> None:
        """Load the weights; raise BrokenCheckpoint if they do not fit.

        `threads`: CPU cores to use, None = all. Torch is set to one thread for the whole process, and uses more only
        while a single instance is computed. `exact`: the reference's arithmetic, in float32. `precision` of the faster
        arithmetic: "float32", "tf32" (on a CPU the same) or "bf16". `views`: how many of the 42 views are rendered.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"there is no precision {precision!r}; there are: {', '.join(PRECISIONS)}")
        self.device = device
        self.version = version_of(weights_file, views)
        self.config = Config(views=views)
        self._threads = len(os.sched_getaffinity(0)) if threads is None else threads
        self._pool = None
        if self._on_cpu:
            torch.set_num_threads(1)
            if self._threads > 1:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="pose")
        with torch.device("meta"):
            network = Network(self.config)
        network.load_state_dict(weights.load_state_dict(weights_file), assign=True)
        network.eval().requires_grad_(False)
        keep_float32()
        self._plain = network
        self.network: Network
        if exact:
            self.network = network if self._on_cpu else copy.deepcopy(network).to(device)
        elif self._on_cpu:
            self.network = FastNetwork.of(network, precision)
        else:
            self.network = GpuNetwork.of(network, precision).to(device)
        self._passes = Runner(self.network) if isinstance(self.network, GpuNetwork) else None

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    # ---------------------------------------------------------------------------------------------------- onboarding

    def onboard(self, object_id: str, mesh: Mesh, symmetries: Symmetries | None, progress: Progress) -> ObjectModel:
        """Render the views, extract their features and keep all that depends on the CAD alone: some 25 s on one core.

        Only declared symmetries are stored: the network searches for none.
        """
        rendered = render_views(mesh, lambda share: progress(share * RENDERING), self.config.views)
        return self.onboard_views(
            object_id, mesh, rendered, symmetries, lambda share: progress(RENDERING + share * (1 - RENDERING))
        )

    def onboard_views(
        self, object_id: str, mesh: Mesh, views: Iterable[View], symmetries: Symmetries | None, progress: Progress
    ) -> ObjectModel:
        """Onboard from given views. Raises InvalidInput for a view that shows nothing.

        Runs on the CPU in the reference's arithmetic, whatever poses are computed in: the stored model serves all
        settings.
        """
        rng = np.random.default_rng(int(object_id[:8], 16))
        inputs = [template_input(view, rng, self.config.view_points) for view in views]
        plain = self._plain
        with torch.inference_mode(), self._all_threads():
            points_m = torch.from_numpy(np.concatenate([seen.points_m for seen in inputs]))
            picked = plain.pick(points_m)
            rgb = torch.from_numpy(np.stack([seen.rgb for seen in inputs]))
            choose = torch.from_numpy(np.stack([seen.choose for seen in inputs])).long()
            features = plain.features_of_views(rgb, choose, picked, progress)
            surface_m = torch.from_numpy(sample_surface(mesh, self.config.model_points)[0].astype(np.float32))
            described = plain.describe(points_m[picked][None], features[None], surface_m[None])
        progress(1.0)
        return ObjectModel(
            object_id=object_id,
            engine=self.name,
            engine_version=self.version,
            diameter_m=max(diameter_of(mesh.vertices_m[np.unique(mesh.faces)].astype(np.float64)), 1e-6),
            symmetries=symmetries or Symmetries(),
            arrays={name: value[0].numpy() for name, value in described._asdict().items()},
        )

    def practice_model(self, object_id: str, mesh: Mesh) -> ObjectModel:
        """Return a model of normal size from one artificial view: points of the surface in a square, all grey.

        Rendering would load Open3D into the process that estimates.
        """
        points_m = sample_surface(mesh, PRACTICE_PX**2)[0].astype(np.float32)
        xyz_m = points_m.reshape(PRACTICE_PX, PRACTICE_PX, 3)
        grey = View(np.full(xyz_m.shape, 128, np.uint8), np.ones(xyz_m.shape[:2], np.bool_), xyz_m)
        return self.onboard_views(object_id, mesh, [grey], None, lambda _: None)

    # ------------------------------------------------------------------------------------------------------- poses

    def prepare(self, model: ObjectModel) -> int:
        """Put a model onto the device, add what is computed faster than read, and return the bytes it takes there."""
        return self._prepared(model).model.nbytes

    def estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        """Return one outcome per instance, in order."""
        if not self._on_cpu:
            return self._estimate(instances, models)
        in_company = len(instances) - len(instances) % self._threads if self._pool else 0
        outcomes: list[Outcome] = []
        if self._pool:
            alone = self._pool.map(lambda instance: self._estimate([instance], models)[0], instances[:in_company])
            outcomes.extend(alone)
        for instance in instances[in_company:]:
            with self._all_threads():
                outcomes.extend(self._estimate([instance], models))
        return outcomes

    @torch.inference_mode()
    def _estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        tasks: list[_Task] = []
        for place, instance in enumerate(instances):
            stored = models.get(instance.object_id)
            if stored is None:
                outcomes.append(Rejection(code="no_cad", detail=f"no model of object {instance.object_id} is loaded"))
                continue
            prepared = self._prepared(stored)
            rng = np.random.default_rng(instance.seed)
            seen = instance_input(instance, prepared.reach_m, rng, self.config.fine_points)
            if isinstance(seen, Rejection):
                outcomes.append(seen)
                continue
            tasks.append(_Task(place, instance, prepared, seen))
            outcomes.append(_UNSEEN)
        if tasks:
            poses = self._poses(self._scene(tasks), [task.prepared.model for task in tasks])
            for row, task in enumerate(tasks):
                outcomes[task.place] = _outcome(task, poses, row)
        return outcomes

    def _poses(self, scene: Scene, models: Sequence[Model]) -> Poses:
        """Return poses on the host, copied once: each copy waits for the device."""
        poses = self._passes(scene, models) if self._passes else self.network(scene, together(models))
        return Poses(*(values.cpu() for values in poses))

    def _scene(self, tasks: Sequence[_Task]) -> Scene:
        draws = [
            torch.rand(3 * self.config.proposals, generator=torch.Generator().manual_seed(task.instance.seed))
            for task in tasks
        ]
        return Scene(
            rgb=self._stacked([task.seen.rgb for task in tasks]),
            points_m=self._stacked([task.seen.points_m for task in tasks]),
            choose=self._stacked([task.seen.choose for task in tasks]).long(),
            uniforms=torch.stack(draws).to(self.device),
        )

    def _prepared(self, model: ObjectModel) -> _Prepared:
        key = f"{self.name}:{self.device}:{type(self.network).__name__}"  # exact and fast store structures differently
        if key not in model.data:
            with torch.inference_mode():
                stored = {name: torch.from_numpy(np.asarray(value)) for name, value in model.arrays.items()}
                kept = Description(**{name: value[None].to(self.device) for name, value in stored.items()})
                radius_m = float(kept.radius_m[0]) + 1e-6
                model.data[key] = _Prepared(
                    model=self.network.model(kept),
                    points_m=model.arrays["points"] * np.float32(radius_m),
                    radius_m=radius_m,
                    reach_m=float(kept.surface.norm(dim=-1).max()) * radius_m,
                )
        prepared: _Prepared = model.data[key]
        return prepared

    def _stacked(self, arrays: Sequence[UInt8 | Float32 | Int32]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.device)

    @contextlib.contextmanager
    def _all_threads(self) -> Iterator[None]:
        """Let torch use all cores for a single instance."""
        if not self._on_cpu:
            yield
            return
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A model on the device."""

    model: Model
    points_m: Float32  # (2048, 3), CAD frame
    radius_m: float
    reach_m: float  # distance from the CAD's origin to the farthest point of the surface


class _Task(NamedTuple):
    """An instance on its way through the network."""

    place: int
    instance: Instance
    prepared: _Prepared
    seen: NetworkInput


_UNSEEN = Rejection(code="engine_error", detail="the network was not asked")


def _outcome(task: _Task, poses: Poses, row: int) -> Outcome:
    score = float(poses.score[row])
    T_cam_obj = np.eye(4)
    T_cam_obj[:3, :3] = poses.R_cam_obj[row].double().numpy()
    T_cam_obj[:3, 3] = poses.t_cam_obj_m[row].double().numpy()
    if not (score > 0 and np.isfinite(T_cam_obj).all()):
        return Rejection(code="no_fit", detail="the network matches none of the depth readings with the object")
    prepared = task.prepared
    return Estimate(
        T_cam_obj=T_cam_obj,
        confidence=min(score, 1.0),
        evidence=evidence(task.instance, prepared.points_m, prepared.radius_m, task.seen.points_m, T_cam_obj),
    )
