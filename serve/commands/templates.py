"""`pem objects templates`: put another renderer's views into the server's store."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pem.commands import common
from pem.commands.objects import Which, model_words
from pem.contract import ObjectModelAnswer
from serve import settings
from serve.commands.options import Config, DataDir

if TYPE_CHECKING:
    from posekit.store import ObjectStore as Store
    from posekit.store import StoredObject


def templates(
    which: Which,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The folder of templates.")],
    data_dir: DataDir = None,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """Give an object templates that another renderer made, in place of our own, for the engine sam6d.

    FOLDER holds 42 views as SAM-6D's renderer writes them, i from 0 to 41: rgb_i.png (colours), mask_i.png (255 on the
    object) and xyz_i.npy (where each pixel is in the CAD's frame, height x width x 3, millimetres). It takes about a
    minute. Run it on the server's machine, with its data directory and settings: a running server takes the new model
    at once. What makes it onboard the object anew (other symmetries, other weights) renders its own views again.

    Example:

      pem objects templates mug outputs/mug/templates --data-dir data
    """
    given = settings.load(config, overrides={"data_dir": data_dir})
    from posekit.errors import PoseError  # imported here: other commands do without posekit, and torch takes seconds
    from posekit.sam6d import templates as read
    from posekit.sam6d.engine import Sam6dEngine
    from posekit.sam6d.settings import Sam6d
    from posekit.sam6d.spec import SPEC
    from posekit.store import ObjectStore
    from workers.stages.onboard import known_symmetries

    if not given.objects_path.is_dir():
        common.fail(f"there are no objects in {given.data_path}: name the server's data directory with --data-dir", 2)
    threads = len(os.sched_getaffinity(0))
    own = given.resolved(SPEC.name)
    assert isinstance(own, Sam6d)
    try:
        store = ObjectStore(given.objects_path)
        stored = _stored(store, which)
        mesh = store.load_mesh(stored.object_id)
        views = read.read_folder(folder, own.views, mesh)
        with common.phases(which) as show:
            begun = time.monotonic()
            show("onboarding", 0.0)
            engine = SPEC.load(own, "cpu", threads)
            assert isinstance(engine, Sam6dEngine)
            symmetries = known_symmetries(store, stored, engine.name, given)
            model = engine.onboard_views(
                stored.object_id, mesh, views, symmetries, lambda share: show("onboarding", share)
            )
            seconds = time.monotonic() - begun
            store.save_model(model, seconds=seconds, threads=threads)
        nbytes = store.describe_model(stored.object_id, engine.name, engine.version).nbytes
    except PoseError as error:
        common.fail(error.detail)
    made = ObjectModelAnswer(status="ready", progress=1.0, seconds=round(seconds, 3), threads=threads, bytes=nbytes)
    common.write_json(json, {"object_id": stored.object_id, "engines": {engine.name: made}})
    if json != "-":
        common.note(f"{which} has these templates now: {model_words(made)}")


def _stored(store: Store, which: str) -> StoredObject:
    """Return the object of this id or name in a data directory; exit with an error if there is none."""
    for stored in store.list():
        if which in (stored.object_id, *stored.names):
            return stored
    common.fail(f"no object is registered as {which}; `pem objects add FILE --name NAME` registers one at the server")
