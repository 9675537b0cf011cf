"""The questions of the accuracy benchmark and their scored answers: pictures and masks in, one row per mask out.

Crops are cut by `workers.cropping` from encoded pictures, exactly as the service cuts them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from benchmarks.accuracy import bop
from benchmarks.accuracy.set import AccuracySet
from pem import rle
from posekit.engine import Bool, Engine, Float32, Float64, Instance, Mesh, ObjectModel, Outcome, Rejection
from posekit.io import images, meshes
from posekit.synthetic.scenes import Scene, pose_errors
from posekit.synthetic.shapes import Shape, mesh_to_ply
from workers import cropping
from workers.messages import Failure, Job, MaskSpec, ObjectRef, Part
from workers.work import Item, Work

RIGHT_SHARE = 0.1  # of the diameter: an answer with a smaller MSSD is right
SEED = 0  # of every request, so that library and service draw the same
SURE = 0.8  # a larger confidence is a promise

Ask = Instance | Rejection  # the engine's input, or the reason why there is none


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A picture pair as a client sends it."""

    rgb: bytes  # PNG
    depth: bytes  # 16-bit PNG
    depth_scale_mm: float
    K: Float64  # (3, 3)

    @staticmethod
    def of(scene: Scene) -> Frame:
        """Encode a scene's pictures."""
        return Frame(
            rgb=images.encode_png(scene.rgb),
            depth=images.encode_png(scene.depth_raw),
            depth_scale_mm=scene.depth_scale_mm,
            K=scene.K,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mask of a scene, and the object to look for under it."""

    scene: int
    index: int  # index of the instance in its scene
    quality: str
    object: str  # the object that the mask shows
    asked: str  # the object to look for: a different one where wrong answers are counted
    visibility: float


class Row(msgspec.Struct, kw_only=True):
    """One answer and its score; the recalls are 0 if there is no pose."""

    scene: int
    index: int
    quality: str
    object: str
    asked: str
    visibility: float
    seconds: float  # seconds of the pass, divided by its instances
    status: str  # "ok", or the code of the rejection
    detail: str = ""
    T_cam_obj: list[list[float]] | None = None
    vsd: float = 0.0
    mssd: float = 0.0
    mspd: float = 0.0
    ar: float = 0.0
    right: bool = False
    mssd_mm: float | None = None
    mspd_px: float | None = None
    angle_deg: float | None = None
    shift_mm: float | None = None
    confidence: float = 0.0
    ambiguous: bool = False
    evidence: dict[str, float] = {}


@dataclass(kw_only=True)
class Bench:
    """The fixed parts of a run: the set, the engine, and its models of the objects."""

    accuracy_set: AccuracySet
    engine: Engine
    models: dict[str, ObjectModel]
    onboarding_s: dict[str, float]
    targets: dict[str, bop.Target]
    references: dict[str, ObjectRef]
    frames: list[Frame]
    decode_ms: list[float] = field(default_factory=list)  # per instance, of every frame cut so far
    _depth: tuple[int, Float32] | None = None

    @staticmethod
    def prepare(accuracy_set: AccuracySet, engine: Engine, names: Sequence[str], tell: Callable[[str], None]) -> Bench:
        """Onboard the objects `names`, one after the other, and prepare their measures; `tell` is called for each.

        The engine gets the meshes as read from a file, the measures get them as they were made.
        """
        models: dict[str, ObjectModel] = {}
        seconds: dict[str, float] = {}
        for name in names:
            mesh = _as_read(accuracy_set.shapes[name].mesh)
            begun = time.perf_counter()
            models[name] = engine.onboard(name, mesh, None, lambda share: None)
            seconds[name] = time.perf_counter() - begun
            engine.prepare(models[name])
            tell(name)
        shapes = {name: accuracy_set.shapes[name] for name in names}
        return Bench(
            accuracy_set=accuracy_set,
            engine=engine,
            models=models,
            onboarding_s=seconds,
            targets={name: bop.prepare_target(shape.mesh, shape.symmetries) for name, shape in shapes.items()},
            references={name: reference(name, shape) for name, shape in shapes.items()},
            frames=[Frame.of(scene) for scene in accuracy_set.scenes],
        )

    def cases(self, quality: str, scene: int) -> list[Case]:
        """Return a case for every mask of a scene, each asked for the object it shows."""
        return [
            Case(
                scene=scene,
                index=index,
                quality=quality,
                object=truth.shape.name,
                asked=truth.shape.name,
                visibility=truth.visibility,
            )
            for index, truth in enumerate(self.accuracy_set.scenes[scene].instances)
        ]

    def cut(self, cases: Sequence[Case], init_T_cam_obj: Sequence[Float64] | None = None) -> list[Ask]:
        """Cut the crops of cases of one scene. `init_T_cam_obj`: (4, 4) each, metres."""
        scene = cases[0].scene
        masks = [self.accuracy_set.masks[case.quality][scene][case.index] for case in cases]
        asks, decode_ms = cut(
            self.frames[scene], masks, [self.references[case.asked] for case in cases], init_T_cam_obj
        )
        self.decode_ms.append(decode_ms / len(cases))
        return asks

    def ask(self, asks: Sequence[Ask]) -> tuple[list[Outcome], float]:
        """Return the engine's outcomes in order, and the seconds that its pass took for each."""
        begun = time.perf_counter()
        found = iter(self.engine.estimate([ask for ask in asks if isinstance(ask, Instance)], self.models))
        outcomes = [next(found) if isinstance(ask, Instance) else ask for ask in asks]
        return outcomes, (time.perf_counter() - begun) / max(len(asks), 1)

    def row(self, case: Case, outcome: Outcome, seconds: float) -> Row:
        """Score the answer against the truth. An answer for another object than the mask shows is never right."""
        if isinstance(outcome, Rejection):
            return Row(**dataclasses.asdict(case), seconds=seconds, status=outcome.code, detail=outcome.detail)
        row = self.posed(case, outcome.T_cam_obj, seconds)
        row.confidence, row.ambiguous = float(outcome.confidence), bool(outcome.ambiguous)
        row.evidence = {name: float(value) for name, value in dataclasses.asdict(outcome.evidence).items()}
        return row

    def posed(self, case: Case, T_est: Float64, seconds: float) -> Row:
        """Score a pose (4, 4) against the truth."""
        row = Row(**dataclasses.asdict(case), seconds=seconds, status="ok", T_cam_obj=T_est.tolist())
        if case.asked != case.object:
            return row
        scene, target = self.accuracy_set.scenes[case.scene], self.targets[case.object]
        truth = scene.instances[case.index]
        errors = bop.pose_error(T_est, truth.T_cam_obj, target, self.depth_m(case.scene), scene.K)
        recalls = bop.recalls(errors, target.diameter_m, scene.rgb.shape[1])
        row.vsd, row.mssd, row.mspd, row.ar = recalls.vsd, recalls.mssd, recalls.mspd, recalls.ar
        row.right = bool(errors.mssd_m < RIGHT_SHARE * target.diameter_m)
        row.mssd_mm = errors.mssd_m * 1000
        row.mspd_px = errors.mspd_px if math.isfinite(errors.mspd_px) else None
        row.angle_deg, row.shift_mm = pose_errors(T_est, truth.T_cam_obj, truth.shape.symmetries)
        return row

    def depth_m(self, scene: int) -> Float32:
        """Return a scene's depth, (H, W) metres. The last one is cached: a scene's instances are scored together."""
        if self._depth is None or self._depth[0] != scene:
            self._depth = (scene, self.accuracy_set.scenes[scene].depth_m)
        return self._depth[1]


def reference(name: str, shape: Shape) -> ObjectRef:
    """Return what the gateway would tell the decode stage about an object."""
    extents_mm = np.sort(np.ptp(shape.mesh.vertices_m, axis=0)) * 1000
    diameter_mm = meshes.diameter_m(shape.mesh.vertices_m) * 1000
    return ObjectRef(object_id=name, diameter_mm=diameter_mm, middle_mm=float(extents_mm[1]))


def cut(
    frame: Frame,
    masks: Sequence[Bool],
    objects: Sequence[ObjectRef],
    init_T_cam_obj: Sequence[Float64] | None = None,
) -> tuple[list[Ask], float]:
    """Cut crops of masks (H, W), one object each, as the decode stage does; also return the milliseconds it took.

    Raises PoseError if the service would refuse the whole request.
    """
    known = list({item.object_id: item for item in objects}.values())
    places = {item.object_id: place for place, item in enumerate(known)}
    specs = [
        MaskSpec(
            raw=msgspec.json.encode(rle.encode_rle(mask)),
            object=places[item.object_id],
            init_T_cam_obj_mm=None if init_T_cam_obj is None else _millimetres(init_T_cam_obj[index]),
        )
        for index, (mask, item) in enumerate(zip(masks, objects, strict=True))
    ]
    job = Job(
        request_id="accuracy",
        rgb=frame.rgb,
        depth=frame.depth,
        K=tuple(float(x) for x in frame.K.ravel()),  # type: ignore[arg-type]
        depth_scale_mm=frame.depth_scale_mm,
        detections=specs,
        objects=known,
        seed=SEED,
        deadline_unix=math.inf,
    )
    done = cropping.cut(Part(part_id="accuracy/0", start=0, stop=len(specs), job=msgspec.msgpack.encode(job)))
    if isinstance(done, Failure):
        raise RuntimeError(done.detail)
    work = Work(done)
    asks: list[Ask] = [
        Rejection(code=crop.rejected[0], detail=crop.rejected[1]) if crop.rejected else Item(work, crop).instance()
        for crop in done.crops
    ]
    return asks, done.decode_ms


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield runs of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run_masks(bench: Bench, quality: str, batch: int | None, tell: Callable[[str], None]) -> list[Row]:
    """Ask for every mask of one quality. `batch`: instances of a pass; None = each scene is a pass of its own."""
    rows: list[Row] = []
    waiting: list[tuple[Case, Ask]] = []
    scenes = len(bench.frames)
    for scene in range(scenes):
        cases = bench.cases(quality, scene)
        if cases:
            waiting += zip(cases, bench.cut(cases), strict=True)
        size = batch or max(len(waiting), 1)
        whole = len(waiting) if scene == scenes - 1 else len(waiting) // size * size
        for some in batches(waiting[:whole], size):
            outcomes, seconds = bench.ask([ask for _, ask in some])
            rows += [bench.row(case, found, seconds) for (case, _), found in zip(some, outcomes, strict=True)]
        waiting = waiting[whole:]
        tell(f"{quality} masks, scene {scene + 1} of {scenes}")
    return rows


def _as_read(mesh: Mesh) -> Mesh:
    """Return a mesh as the service has it after reading it from a PLY file: rounded in millimetres, vertices merged."""
    raw = meshes.load_mesh({"object.ply": mesh_to_ply(mesh)}, "ply", max_faces=len(mesh.faces))
    return meshes.to_mesh(raw, "mm")


def _millimetres(T_cam_obj: Float64) -> list[float]:
    T_mm = np.array(T_cam_obj, dtype=np.float64)
    T_mm[:3, 3] *= 1000
    return [float(x) for x in T_mm.ravel()]
