"""The setup of a serving peer, and the work that is the same for all of them: only the serving differs.

A peer is a server in a process of its own, `PEER_SETUP='{"data": ...}' python -m benchmarks.peers.NAME`, run from the
project's root by an environment with its packages (`make peers-serving`). It answers

    POST /api/v1/pose_estimation    the MessagePack body of this project's own contract; MessagePack back
    GET  /readyz                    200 once it can

with `Decoder` (the server's own checks and cropping) and `Poses` (its engines, models and rows) inside. Objects come
from the store of a server that has onboarded them. For a request that cannot be answered, a peer returns what the
framework makes of an exception: the benchmark counts it as an error.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import cv2
import msgspec

from pem import contract as schemas
from pem.contract import Row
from posekit import registry
from posekit.engine import Outcome
from posekit.sam6d.settings import Sam6d
from posekit.store import ObjectStore
from serve.reading import decode
from serve.settings import Limits
from serve.tasks.pose import question as parse
from workers.cropping import cut
from workers.engines import load_engine, practise
from workers.messages import Asked, Cut, Failure, Job, ObjectRef, Part, PassRecord, shared
from workers.models import ModelCache
from workers.settings import EngineName, Pose, Stages
from workers.work import Item, Work

ROUTE: Final = "/api/v1/pose_estimation"
READY: Final = "/readyz"
MSGPACK: Final = "application/msgpack"
ENVIRONMENT: Final = "PEER_SETUP"
_DEADLINE_S: Final = 3600.0  # peers have none; the shared code needs one


class Setup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The setup of a peer; its processes read it from the environment."""

    data: str  # data directory of a server that has onboarded the objects
    port: int
    ready_dir: str  # each process with an engine leaves a file here once it can answer
    engine: EngineName = "geometric"
    weights: str = ""  # of the network
    views: int = 42  # number of views that the objects were onboarded with
    device: str = "cpu"
    engines: int = 1  # processes that hold an engine
    threads: int = 1  # detections that each engine computes at a time on a CPU
    decoders: int = 1  # processes that decode, if separate from those with an engine
    callers: int = 1  # requests that one process handles at a time, if a peer has no batches
    batch: int = 8  # largest batch: detections, or requests where the framework counts those
    wait_ms: int = 5  # longest time for which a batch is gathered

    @property
    def objects_dir(self) -> Path:
        """Return the object store's folder."""
        return Path(self.data) / "objects"

    def stages(self) -> Stages:
        """Return the setup as settings of the server's own workers."""
        weights = Sam6d(weights=self.weights, views=self.views)
        return Stages(objects_dir=str(self.objects_dir), engines=(self.engine,), sam6d=weights)


def to_environment(setup: Setup) -> dict[str, str]:
    """Return the variable that hands a setup to a peer and to the processes that it starts."""
    return {ENVIRONMENT: msgspec.json.encode(setup).decode()}


def from_environment() -> Setup:
    """Read the setup that this process was started with; KeyError if there is none."""
    return msgspec.json.decode(os.environ[ENVIRONMENT], type=Setup)


class Decoder:
    """Turns a request's body into crops, as the server's gateway and decode stage do."""

    def __init__(self, setup: Setup) -> None:
        cv2.setNumThreads(1)  # as in the decode stage
        self._engine = setup.engine
        self._known: dict[str, ObjectRef] = {}
        for stored in ObjectStore(setup.objects_dir).list():
            reference = ObjectRef(
                object_id=stored.object_id, diameter_mm=stored.diameter_mm, middle_mm=sorted(stored.extents_mm)[1]
            )
            self._known |= dict.fromkeys([stored.object_id, *stored.names], reference)

    def decode(self, body: bytes) -> Cut:
        """Cut out the request's detections. Raises ApiError, PoseError and KeyError (an unknown object)."""
        limits = Limits()
        request = decode(body, "msgpack", schemas.PoseRequest)
        question = parse.pose_question(request, "msgpack", limits)
        usual = registry.spec(self._engine).refine
        job = Job(
            **shared(Asked, question.asked),
            request_id="peer",
            objects=[self._known[choice.object_id or ""] for choice in question.choices],
            engine=self._engine,
            refine=usual if question.refine == "auto" else question.refine,
            deadline_unix=time.time() + _DEADLINE_S,
            max_megapixels=limits.image_megapixels,
            max_mask_megapixels=limits.mask_megapixels,
        )
        part = Part(part_id="peer", start=0, stop=len(job.detections), job=msgspec.msgpack.encode(job))
        found = cut(part)
        if isinstance(found, Failure):
            raise RuntimeError(found.detail)
        return found


class Poses:
    """An engine with the models of all objects, as in the server's pose stage."""

    def __init__(self, setup: Setup) -> None:
        """Load and warm up the engine, which takes seconds; then write the file that reports it."""
        own = Pose()
        self._engine = load_engine(setup.engine, setup.stages(), device=setup.device, threads=setup.threads)
        with tempfile.TemporaryDirectory() as folder:
            practise(self._engine, setup.batch, Path(folder))
        self._models = ModelCache(setup.objects_dir, limit_bytes=own.object_cache_mb * 1_000_000)
        self._models.warm_up([self._engine])
        (Path(setup.ready_dir) / str(os.getpid())).touch()

    def together(self, cuts: Sequence[Cut]) -> list[list[Row]]:
        """Return the rows of each request; all their detections run in one pass."""
        works = [Work(one) for one in cuts]
        items = [item for work in works for item in work.items(self._engine.name)]
        self._note(items, self._estimate(items))
        return [_rows(work) for work in works]

    def one_by_one(self, one: Cut) -> list[Row]:
        """Return the rows of a request; each detection runs in a pass of its own."""
        work = Work(one)
        for item in work.items(self._engine.name):
            self._note([item], self._estimate([item]))
        return _rows(work)

    def _estimate(self, items: Sequence[Item]) -> list[Outcome]:
        models = {name: self._models.get(self._engine, name) for name in {item.object_id for item in items}}
        return self._engine.estimate([item.instance() for item in items], models) if items else []

    def _note(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
        record = PassRecord(engine=self._engine.name, detections=len(items), requests=0, seconds=0.0)
        for item, outcome in zip(items, outcomes, strict=True):
            item.note(outcome, record)


def answer(rows: list[Row], engine: str) -> bytes:
    """Return the body of an answer, MessagePack."""
    return msgspec.msgpack.encode(schemas.PoseAnswer(success=True, poses=rows, engine=engine))


def _rows(work: Work) -> list[Row]:
    solved = work.answer()
    if isinstance(solved, Failure):
        raise RuntimeError(solved.detail)
    return solved.rows
