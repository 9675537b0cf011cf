"""The engines by name, and a first exercise for them. Asking for versions is cheap, loading an engine is not."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

import pointnet2_ext
from posekit.engine import Engine, Instance, ObjectModel
from posekit.errors import BrokenCheckpoint, StoreError
from posekit.store import ObjectStore
from posekit.synthetic.box import box_instance, box_mesh
from workers.settings import Stages

Loader = Callable[[Stages, str, int], Engine]


def _geometric(stages: Stages, device: str, threads: int) -> Engine:
    from posekit.geometric.engine import GeometricEngine

    return GeometricEngine(device=device, threads=threads)


def _geometric_version(stages: Stages) -> str:
    from posekit.geometric import VERSION

    return VERSION


def _sam6d(stages: Stages, device: str, threads: int) -> Engine:
    from posekit.sam6d.engine import Sam6dEngine

    if stages.sam6d_version not in (None, _version_of_the_weights(stages)):  # its models would be read by nobody
        raise BrokenCheckpoint("the weights were replaced since the server started; start it again")
    own = stages.sam6d
    precision = own.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") and not own.exact else "float32"
    return Sam6dEngine(
        weights_file=Path(own.weights),
        device=device,
        threads=threads,
        exact=own.exact,
        precision=precision,
        views=own.views,
    )


def _sam6d_version(stages: Stages) -> str:
    return stages.sam6d_version or _version_of_the_weights(stages)


def _version_of_the_weights(stages: Stages) -> str:
    from posekit.sam6d.checkpoint.version import version_of

    return version_of(Path(stages.sam6d.weights), stages.sam6d.views)


_ENGINES: dict[str, tuple[Loader, Callable[[Stages], str]]] = {
    "geometric": (_geometric, _geometric_version),
    "sam6d": (_sam6d, _sam6d_version),
}


def load_engine(name: str, stages: Stages | None = None, *, device: str, threads: int) -> Engine:
    """The engine `name` on `device` ("cpu", "cuda:0"), with `threads` CPU threads. Imports what it needs: seconds."""
    return _known(name)[0](stages or Stages(), device, threads)


def versions(stages: Stages) -> dict[str, str]:
    """Engine name -> version, part of the stored model's file name, the default first. Imports no torch."""
    return {name: _known(name)[1](stages) for name in stages.engines}


def with_fixed_versions(stages: Stages) -> Stages:
    """The same with the version of the weights that are there now: workers that start later load no others."""
    return msgspec.structs.replace(stages, sam6d_version=versions(stages).get("sam6d"))


def kernels(device: str, engines: Iterable[str] = ("geometric",)) -> dict[str, str]:
    """Operation -> "compiled" or "reference": what these engines run on `device`. Imports torch."""
    from posekit.geometric import kernels as geometric

    found: dict[str, str] = {**pointnet2_ext.kernels(device), **geometric.kernels(device)}
    if "sam6d" in engines:
        from posekit.sam6d import kernels as sam6d

        found |= sam6d.kernels(device)
    return found


def _known(name: str) -> tuple[Loader, Callable[[Stages], str]]:
    if name not in _ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are: {', '.join(_ENGINES)}")
    return _ENGINES[name]


# ------------------------------------------------------------------------------------------------------ first exercise

_MOMENT_S = 1.0


def practise(engine: Engine, detections: int, folder: Path) -> float:
    """Let an engine solve a small made-up scene, so that what it does once is done, and return its detections/s.

    A pass of `detections` is timed where that takes no longer than a moment, else a single one. The model of the
    scene's box is kept in `folder`, so that a worker that replaces another one is there sooner.
    """
    model = _practice_model(engine, folder)
    engine.prepare(model)
    instances = [box_instance(seed, model.object_id) for seed in range(detections)]
    seconds = [_time(engine, instances[:1], model) for _ in range(2)][-1]
    if seconds * detections > _MOMENT_S:
        return 1.0 / seconds
    return detections / _time(engine, instances, model)


def _time(engine: Engine, instances: list[Instance], model: ObjectModel) -> float:
    begun = time.perf_counter()
    engine.estimate(instances, {model.object_id: model})
    return max(time.perf_counter() - begun, 1e-6)


def _practice_model(engine: Engine, folder: Path) -> ObjectModel:
    object_id = hashlib.sha256(b"the box of the first exercise").hexdigest()
    try:
        return ObjectStore(folder).load_model(object_id, engine.name, engine.version)
    except StoreError:
        model = engine.practice_model(object_id, box_mesh())
    with contextlib.suppress(StoreError, OSError):  # no room: then the next worker builds it again
        store = ObjectStore(folder)
        store.folder(object_id).mkdir(exist_ok=True)
        store.save_model(model)
    return model
