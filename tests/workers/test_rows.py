"""From an engine's outcome to the row of the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec import UNSET

from pem.contract import RowError
from posekit.engine import Estimate, Evidence, Hypothesis, Rejection
from workers.messages import Crop
from workers.rows import make_row

CROP = Crop(index=0, object_id="ab" * 32, bbox=(1.0, 2.0, 3.0, 4.0), category="mug")
EVIDENCE = Evidence(inlier_fraction=0.9, residual_mm=1.5, visible_overlap=0.8, free_space_violation=0.01)


def pose(x_m: float = 0.1) -> Any:
    T_cam_obj = np.eye(4)
    T_cam_obj[0, 3] = x_m
    return T_cam_obj


def estimate(**changes: Any) -> Estimate:
    runners_up = tuple(Hypothesis(T_cam_obj=pose(0.1 * k), confidence=1 / k) for k in (2, 3))
    usual = {"T_cam_obj": pose(), "confidence": 0.5, "evidence": EVIDENCE, "hypotheses": runners_up}
    return Estimate(**(usual | changes))


def test_a_pose_is_answered_in_millimetres_with_its_evidence() -> None:
    row = make_row(CROP, estimate(), min_score=0.0, hypotheses=0)
    assert (row.status, row.object_id, row.cad_id, row.bbox) == ("ok", "mug", CROP.object_id, CROP.bbox)
    assert row.translation == [100.0, 0.0, 0.0]
    assert (row.evidence.residual_mm, row.confidence) == (1.5, 0.5)  # type: ignore[union-attr]
    assert row.hypotheses is UNSET, "none were asked for"


@pytest.mark.parametrize("min_score, status", [(0.5, "ok"), (0.51, "rejected")])
def test_a_confidence_below_min_score_is_a_rejection_and_one_at_it_is_not(min_score: float, status: str) -> None:
    row = make_row(CROP, estimate(), min_score=min_score, hypotheses=0)
    assert (row.status, row.confidence) == (status, 0.5)
    assert row.evidence is not UNSET
    if isinstance(row.error, RowError):
        assert row.error.code == "low_confidence"


@pytest.mark.parametrize("asked, given", [(1, [200.0]), (2, [200.0, 300.0]), (9, [200.0, 300.0])])
def test_as_many_runners_up_are_answered_as_were_asked_for(asked: int, given: list[float]) -> None:
    row = make_row(CROP, estimate(), min_score=0.0, hypotheses=asked)
    assert isinstance(row.hypotheses, list)
    assert [one.translation[0] for one in row.hypotheses] == pytest.approx(given)


@pytest.mark.parametrize(
    "outcome, code",
    [
        (estimate(T_cam_obj=pose(float("nan"))), "engine_error"),
        (Rejection(code="no_fit", detail="nothing matches"), "no_fit"),
    ],
    ids=["not finite", "rejected"],
)
def test_a_detection_without_a_pose_says_why(outcome: Any, code: str) -> None:
    row = make_row(CROP, outcome, min_score=0.0, hypotheses=1)
    assert (row.status, row.rotation, row.translation, row.confidence) == ("rejected", None, None, 0.0)
    assert isinstance(row.error, RowError)
    assert row.error.code == code
