"""A store with one onboarded object, the stages in this process, and the pipeline as Mosec runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from posekit.store import ObjectStore, StoredObject
from posekit.synthetic.scenes import Scene, make_scene
from posekit.synthetic.shapes import SHAPES
from tests.workers.support import SHAPE, Asker, Pipeline, register
from workers import settings
from workers.messages import ObjectRef
from workers.settings import Stages
from workers.stages.decode import DecodeStage
from workers.stages.inspect_cad import InspectStage
from workers.stages.onboard import OnboardStage
from workers.stages.pose import PoseStage
from workers.stages.respond import RespondStage


@pytest.fixture(scope="session")
def scene() -> Scene:
    """Return a scene of three brackets on a table."""
    return make_scene(3, shapes=[SHAPES[SHAPE]()], count=3, occlusion=False)


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return small settings for a small machine, with a store that all tests of this folder share."""
    home = tmp_path_factory.mktemp("pem")
    return Stages(
        objects_dir=str(home / "objects"),
        run_dir=str(home / "run"),
        decode=settings.Decode(workers=1),
        pose=settings.Pose(pass_detections=4, threads=1, batch_requests=16),
    )


@pytest.fixture(scope="session")
def shared(stages: Stages) -> Iterator[Stages]:
    """Set the environment in which stages made in this process find those settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(settings.ENVIRONMENT, settings.to_environment(stages)[settings.ENVIRONMENT])
        yield stages


@pytest.fixture(scope="session")
def stored(shared: Stages) -> StoredObject:
    """Register and onboard the scene's object."""
    return register(ObjectStore(Path(shared.objects_dir)), InspectStage().forward, OnboardStage().forward)


@pytest.fixture(scope="session")
def asker(scene: Scene, stored: StoredObject) -> Asker:
    return Asker(scene=scene, reference=ObjectRef(object_id=stored.object_id, diameter_mm=stored.diameter_mm))


@pytest.fixture(scope="session")
def decode(shared: Stages) -> DecodeStage:
    return DecodeStage()


@pytest.fixture(scope="session")
def pose(shared: Stages, stored: StoredObject) -> PoseStage:
    return PoseStage()


@pytest.fixture(scope="session")
def respond(shared: Stages) -> RespondStage:
    return RespondStage()


@pytest.fixture(scope="session")
def pipeline(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Start the pipeline over a separate store, with the settings of the other tests."""
    folder = tmp_path_factory.mktemp("pipeline")
    own = msgspec.structs.replace(stages, objects_dir=str(folder / "objects"), run_dir=str(folder / "run"))
    running = Pipeline(own, folder)
    running.start()
    yield running
    running.stop()
