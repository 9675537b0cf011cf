"""Decode stage. In: a part of a job, pictures still encoded. Out: its detections as crops, or a Failure. On the CPU.

Colour and depth are decoded once, masks one at a time. Each detection becomes a crop: its mask's box with a margin.
A detection that cannot be used becomes a crop with the reason. Only an error of the whole request is a Failure.
"""

from __future__ import annotations

from posekit.errors import PoseError
from workers.jobs import GivenUp, failure_from, put_beside
from workers.lifecycle import Stage, limit_threads
from workers.messages import Cut, CutFile, Failure, Part


class DecodeStage(Stage):
    """Runs in several processes; each holds one image pair at a time."""

    stage_name = "decode"
    receives = Part

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            from workers import cropping  # imports OpenCV

            limit_threads(self.settings.decode.threads)
            self.cut = cropping.cut

    def forward(self, part: Part) -> Cut | Failure:
        """Return one part's crops."""
        try:
            return self.cut(part)
        except PoseError as error:
            return failure_from(error, part.part_id)
        except GivenUp:
            return Failure(part_id=part.part_id, code="internal", detail="the request was given up before it was read")
        except MemoryError:
            return Failure(part_id=part.part_id, code="too_large", detail="not enough memory to decode this request")
        except Exception:
            return self.internal(part.part_id)

    def serialize_ipc(self, data: Cut | Failure) -> bytes:
        """Encode for the pose stage; large results go into a file, so that Mosec's front does not hold them."""
        encoded = super().serialize_ipc(data)
        if isinstance(data, Cut) and (path := put_beside(data.part.path, encoded)) is not None:
            return self._encoder.encode(CutFile(part_id=data.part.part_id, path=path))
        return encoded
