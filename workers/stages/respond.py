"""Respond stage. In: a part's rows. Out: the answer as the gateway reads it, with overlay and files if asked for.

A request in one part comes from the pose stage with its rows. One that was split comes a second time, from the gateway
with all of its rows (route /finish), for outputs that need all rows. One request at a time, on the CPU.
"""

from __future__ import annotations

import time

import msgspec

from posekit.errors import PoseError, StoreError
from workers.jobs import GivenUp, failure_from, read_job
from workers.lifecycle import Stage, item_id, limit_threads
from workers.messages import Failure, FinishPart, PartAnswer, PartResult, RespondInput, Solved, shared
from workers.settings import objects_path


class RespondStage(Stage):
    """The first stage of /finish, the last of /pose."""

    stage_name = "respond"
    receives = RespondInput

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            import open3d  # noqa: F401  the overlay's renderer, which takes a second or two

            from workers.outputs import Outputs

            limit_threads(1)
            self.outputs = Outputs(objects_path(self.settings))

    def forward(self, message: RespondInput) -> PartAnswer | Failure:
        """Return the answer; a failure of an earlier stage passes through."""
        if isinstance(message, Failure):
            return message
        part_id, begun, begun_unix = item_id(message), time.perf_counter(), time.time()
        try:
            answer = self._solved(message) if isinstance(message, Solved) else self._finish(message)
        except StoreError as error:
            self.log.error("output_failed", part_id=part_id, reason=str(error.__cause__ or error))
            return Failure(part_id=part_id, code="storage_full", detail=error.detail, field=error.field)
        except PoseError as error:
            return failure_from(error, part_id)
        except GivenUp:
            return Failure(part_id=part_id, code="internal", detail="the request was given up before it was answered")
        except Exception:
            return self.internal(part_id)
        respond_ms = (time.perf_counter() - begun) * 1000.0
        return msgspec.structs.replace(answer, respond_ms=respond_ms, respond_unix=begun_unix)

    def _solved(self, solved: Solved) -> PartAnswer:
        picture, written = None, False
        if solved.part.finish:
            job = read_job(solved.part.path, solved.part.job)
            picture, written = self.outputs.make(job, solved.rows, seconds=solved.pose_ms / 1000.0)
        return PartAnswer(
            part_id=solved.part.part_id,
            visualization=picture,
            output_written=written,
            **shared(PartResult, solved),
        )

    def _finish(self, message: FinishPart) -> PartAnswer:
        job = read_job(message.path, message.job)
        picture, written = self.outputs.make(job, message.rows, seconds=-1.0)
        return PartAnswer(part_id=message.part_id, visualization=picture, output_written=written)
