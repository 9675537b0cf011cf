"""A pose request from its checked question to its answer: engine, CAD, detections, its turn, rows.

PoseTask.answer:  pick an engine ▸ admit ▸ resolve the CADs ▸ (ask the ISM server) ▸ admit ▸ queue, backend ▸ answer
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from functools import partial
from pathlib import Path

import structlog

from serve.engine_choice import Engines, Pick
from serve.errors import ApiError
from serve.objects.catalogue import Objects, Resolved
from serve.objects.ingest import inside
from serve.scheduling.queue import Queue
from serve.settings import Settings
from serve.tasks.asker import Asker
from serve.tasks.pose.ism import IsmClient
from serve.tasks.pose.outputs import Outputs
from serve.tasks.pose.parts import UNIT, Answer, PoseWork, found_detections, pose_answer, solve
from serve.tasks.pose.question import Question, detections_from_ism
from serve.telemetry.metrics import Metrics
from serve.telemetry.tracing import Tracing
from workers.messages import Asked, Job, shared

log = structlog.get_logger()


class PoseTask:
    """Answers the pose routes; one instance for the life of the server."""

    def __init__(
        self,
        settings: Settings,
        *,
        engines: Engines,
        objects: Objects,
        queue: Queue,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._objects = objects
        self._queue = queue
        self._metrics = metrics
        self._tracing = tracing
        self._ism = IsmClient(settings.ism)
        self.outputs = Outputs(settings.data_path / "outputs.list", settings.storage.output_days)

    async def close(self) -> None:
        """Close the connections to the ISM server."""
        await self._ism.close()

    async def answer(self, asker: Asker, question: Question) -> Answer:
        """Return the answer in the dialect of the question. Raises ApiError for errors of the whole request."""
        pick = self._engines.pick(question.engine)
        output_dir = self._output_dir(question.output_dir)
        whole = question.template_dir is not None
        count = max(len(question.asked.detections), 1 if whole else 0)
        self._admit(asker, count, pick.engine)
        try:
            resolved = await self._resolve(asker, question, pick.engine)
        except ApiError as error:
            other = self._engines.instead(pick, error.detail) if error.code == "onboarding_failed" else None
            if other is None:
                raise
            pick = other
            resolved = await self._resolve(asker, question, pick.engine)
        ism_ms = await self._ask_ism(asker, question) if whole else None
        if time.monotonic() >= asker.deadline:
            raise ApiError("deadline", "the deadline passed before the answer was ready")
        self._admit(asker, len(question.asked.detections), pick.engine)  # others may have come meanwhile
        work = PoseWork(self._job(asker, question, resolved, pick, output_dir))
        if not whole:  # the work releases the pictures once they are spooled
            question.let_pictures_go()
        try:
            with self._tracing.queued(work.request_id, asker.trace):
                solution = await solve(self._queue, work, asker.client, asker.deadline)
        except ApiError as error:
            if whole and (error.field or "").startswith(question.asked.field_prefix):  # a mask the client never sent
                log.warning("ism_mask_broken", id=asker.request_id, field=error.field, detail=error.detail)
                raise ApiError(
                    "ism_failed", f"the instance-segmentation server sent a mask that cannot be used: {error.detail}"
                ) from None
            raise
        if output_dir is not None and solution.output_written:
            self.outputs.wrote(output_dir)
        pick = self._engines.answered(pick, solution.engine)
        release = self._engines.releases[pick.engine]
        asker.notes.engine, asker.notes.release = pick.engine, release
        if pick.warning is not None:
            solution.warnings.append(pick.warning)
        found = await asyncio.to_thread(found_detections, question, solution.rows) if whole else None
        return pose_answer(
            asker,
            question,
            resolved,
            solution,
            release=release,
            degraded=pick.reason is not None,
            ism_ms=ism_ms,
            found=found,
        )

    def _admit(self, asker: Asker, count: int, engine: str) -> None:
        self._queue.admit(asker.client, count, asker.deadline - time.monotonic(), engine, UNIT)

    async def _resolve(self, asker: Asker, question: Question, engine: str) -> list[Resolved]:
        one = partial(self._objects.resolve, unit=question.model_unit, deadline=asker.deadline, engine=engine)
        begun_unix, waited = time.time(), False
        try:
            resolved = await asyncio.gather(*(one(choice) for choice in question.choices))
            waited = any(each.onboard_ms is not None for each in resolved)
        except ApiError as error:
            waited = error.code in ("onboarding", "onboarding_failed")
            raise
        finally:
            if waited:
                asker.trace.add("onboard", begun_unix, time.time(), {"pem.engine": engine})
        return resolved

    def _output_dir(self, text: str | None) -> Path | None:
        if text is None:
            return None
        path = inside(self._settings.output_path, text, "output_dir")
        if os.path.isabs(text):
            raise ApiError("invalid", "output_dir is relative to the server's output root", field="output_dir")
        there = next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)
        if not os.path.isdir(there) or any(len(os.fsencode(name)) > 255 for name in path.parts):
            detail = "no folder can be made at output_dir: a file is in its way, or its name is too long"
            raise ApiError("invalid", detail, field="output_dir")
        return path

    async def _ask_ism(self, asker: Asker, question: Question) -> float:
        """Put the ISM server's detections into the question; return the milliseconds that it took."""
        begun = time.monotonic()
        assert question.template_dir is not None
        asked = question.asked
        with asker.trace.asking("ism") as headers:
            found = await self._ism.find(
                rgb=asked.rgb,
                depth=asked.depth,
                cam_params={"cam_K": list(asked.K), "depth_scale": asked.depth_scale_mm},
                template_dir=question.template_dir,
                cad_path=question.ism_cad_path,
                deadline_unix=time.time() + asker.deadline - begun,
                request_id=asker.request_id,
                headers=headers,
            )
        self._metrics.stage("ism", found.seconds)
        detections_from_ism(question, found.masks, found.boxes, found.scores, found.object_ids)
        asker.notes.detections = len(question.asked.detections)
        return (time.monotonic() - begun) * 1e3

    def _job(
        self, asker: Asker, question: Question, resolved: list[Resolved], pick: Pick, output_dir: Path | None
    ) -> Job:
        limits = self._settings.limits
        return Job(
            **shared(Asked, question.asked),
            request_id=f"{asker.request_id}-{secrets.token_hex(4)}",  # a client may send the same id twice
            objects=[one.ref for one in resolved],
            engine=pick.engine,
            refine=pick.refine if question.refine == "auto" else question.refine,
            deadline_unix=time.time() + asker.deadline - time.monotonic(),
            max_megapixels=limits.image_megapixels,
            max_mask_megapixels=limits.mask_megapixels,
            output_dir=str(output_dir) if output_dir is not None else None,
        )
