"""The answer of a pose request, put together from its parts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from pem.contract import PoseAnswer
from serve.scheduling.receipt import Receipt
from serve.tasks.pose.parts import Solution, pose_answer


def answer(resolved: list[Any]) -> PoseAnswer:
    """Answer a request without detections, whose CADs were resolved so."""
    asker = SimpleNamespace(notes=SimpleNamespace(), body_received=time.monotonic())
    question = SimpleNamespace(warnings=[], output_dir=None, coco=None, asked=SimpleNamespace(visualize=False))
    solution = Solution(
        rows=[],
        engine="geometric",
        warnings=[],
        receipt=Receipt(decode_ms=0.0, queue_ms=0.0, pose_ms=0.0, respond_ms=0.0),
        batch_detections=0,
        batch_requests=0,
    )
    found = pose_answer(
        asker,  # type: ignore[arg-type]
        question,  # type: ignore[arg-type]
        resolved,
        solution,
        release="geometric-2",
        degraded=False,
        ism_ms=None,
        found=None,
    )
    assert isinstance(found, PoseAnswer)
    return found


def test_cads_that_are_onboarded_side_by_side_count_as_long_as_the_longest() -> None:
    waited = [SimpleNamespace(onboard_ms=ms, path_used=None) for ms in (800.0, None, 1200.0)]
    assert answer(waited).timing.onboard_ms == 1200.0  # type: ignore[union-attr]
    assert answer(waited[1:2]).timing.onboard_ms is None  # type: ignore[union-attr]


def test_the_first_cad_path_of_a_request_is_named() -> None:
    used = [SimpleNamespace(onboard_ms=None, path_used=path) for path in (None, "mug.ply", "can.ply")]
    assert answer(used).cad_path_used == "mug.ply"
