"""Turn an engine's outcome into the row that the client reads; a pose's metres become millimetres here."""

from __future__ import annotations

import numpy as np
from msgspec import UNSET, UnsetType

from pem.contract import Row, RowError, RowEvidence, RowHypothesis
from posekit.engine import Estimate, Float64, Outcome, Rejection
from posekit.units import transform_m_to_mm
from workers.messages import Crop


def make_row(crop: Crop, outcome: Outcome, *, min_score: float, hypotheses: int) -> Row:
    """Make one row of the answer.

    An estimate with a confidence below `min_score` becomes the row `low_confidence`, with its confidence and evidence.
    One with numbers that are not finite becomes `engine_error`.
    """
    if isinstance(outcome, Estimate) and not np.isfinite(outcome.T_cam_obj).all():
        outcome = Rejection(code="engine_error", detail="the engine's pose has numbers that are not finite")
    if isinstance(outcome, Rejection):
        return rejected_row(crop, outcome.code, outcome.detail)
    evidence = RowEvidence(
        inlier_fraction=float(outcome.evidence.inlier_fraction),
        residual_mm=float(outcome.evidence.residual_mm),
        visible_overlap=float(outcome.evidence.visible_overlap),
        free_space_violation=float(outcome.evidence.free_space_violation),
    )
    if outcome.confidence < min_score:
        detail = f"confidence {outcome.confidence:.3f} is below min_score {min_score:g}"
        return rejected_row(crop, "low_confidence", detail, confidence=float(outcome.confidence), evidence=evidence)
    runners_up = [
        RowHypothesis(
            rotation=_rotation(runner_up.T_cam_obj),
            translation=_translation_mm(runner_up.T_cam_obj),
            confidence=float(runner_up.confidence),
        )
        for runner_up in outcome.hypotheses[:hypotheses]
    ]
    return Row(
        object_id=crop.category,
        cad_id=crop.object_id,
        rotation=_rotation(outcome.T_cam_obj),
        translation=_translation_mm(outcome.T_cam_obj),
        confidence=float(outcome.confidence),
        bbox=crop.bbox,
        status="ok",
        evidence=evidence,
        ambiguous=bool(outcome.ambiguous),
        hypotheses=runners_up if hypotheses else UNSET,
    )


def rejected_row(
    crop: Crop, code: str, detail: str, *, confidence: float = 0.0, evidence: RowEvidence | UnsetType = UNSET
) -> Row:
    """Make the row of a detection without a pose."""
    return Row(
        object_id=crop.category,
        cad_id=crop.object_id,
        rotation=None,
        translation=None,
        confidence=confidence,
        bbox=crop.bbox,
        status="rejected",
        evidence=evidence,
        error=RowError(code=code, detail=detail),
    )


def _rotation(T_cam_obj: Float64) -> list[list[float]]:
    rotation: list[list[float]] = T_cam_obj[:3, :3].astype(np.float64).tolist()
    return rotation


def _translation_mm(T_cam_obj: Float64) -> list[float]:
    translation_mm: list[float] = transform_m_to_mm(T_cam_obj)[:3, 3].tolist()
    return translation_mm
