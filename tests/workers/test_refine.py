"""The final pose: the network's, or the refiner's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from posekit.engine import Estimate, Evidence, Float64, Hypothesis, Instance, Outcome, Rejection
from posekit.synthetic.box import box_instance
from workers.refine import refined

NETWORKS = Evidence(inlier_fraction=0.5, residual_mm=5.0, visible_overlap=0.5, free_space_violation=0.1)
REFINERS = Evidence(inlier_fraction=0.9, residual_mm=1.0, visible_overlap=0.9, free_space_violation=0.0)


def pose(x_m: float) -> Float64:
    T_cam_obj = np.eye(4)
    T_cam_obj[0, 3] = x_m
    return T_cam_obj


def instance(seed: int, refine: Literal["icp", "none"], init_T_cam_obj: Float64 | None = None) -> Instance:
    made = box_instance(seed, "box")
    fields: dict[str, Any] = {**vars(made), "refine": refine, "init_T_cam_obj": init_T_cam_obj, "hypotheses": 2}
    return Instance(**fields)


def network(instances: Sequence[Instance]) -> list[Outcome]:
    """Return a pose for each detection; none for seed 13."""
    runner_up = Hypothesis(T_cam_obj=pose(9.0), confidence=0.1)
    found = Estimate(T_cam_obj=pose(0.5), confidence=0.7, evidence=NETWORKS, ambiguous=True, hypotheses=(runner_up,))
    return [Rejection(code="no_fit", detail="no") if one.seed == 13 else found for one in instances]


def refiner(instances: Sequence[Instance]) -> list[Outcome]:
    """Return a pose a millimetre beside the start; reject seed 99."""
    outcomes: list[Outcome] = []
    for one in instances:
        assert one.init_T_cam_obj is not None
        moved = one.init_T_cam_obj + pose(0.001) - np.eye(4)
        good = Estimate(T_cam_obj=moved, confidence=0.2, evidence=REFINERS)
        outcomes.append(Rejection(code="no_fit", detail="far off") if one.seed == 99 else good)
    return outcomes


def solve(*instances: Instance, kept: dict[int, str] | None = None) -> list[Any]:
    told = {} if kept is None else kept
    return refined(
        instances, network=network, refiner=refiner, kept=lambda index, why: told.update({index: why.detail})
    )


def test_a_refined_pose_has_the_refiners_place_and_evidence_and_the_networks_confidence() -> None:
    [outcome] = solve(instance(1, "icp"))
    assert outcome.T_cam_obj[0, 3] == 0.501
    assert outcome.evidence == REFINERS
    assert (outcome.confidence, outcome.ambiguous, len(outcome.hypotheses)) == (0.7, True, 1)


def test_what_the_refiner_rejects_stays_as_the_network_left_it() -> None:
    kept: dict[int, str] = {}
    _, outcome = solve(instance(1, "icp"), instance(99, "icp"), kept=kept)
    assert (outcome.T_cam_obj[0, 3], outcome.evidence) == (0.5, NETWORKS)
    assert kept == {1: "far off"}, "and whoever asked for it hears why"


def test_without_refinement_the_refiner_is_not_asked_for_found_poses() -> None:
    [plain, rejected] = solve(instance(1, "none"), instance(13, "icp"))
    assert (plain.T_cam_obj[0, 3], plain.evidence) == (0.5, NETWORKS)
    assert rejected.code == "no_fit"


def test_a_pose_that_comes_with_the_request_is_the_refiners_alone_in_its_place_among_others() -> None:
    outcomes = solve(instance(1, "none"), instance(2, "none", pose(0.2)), instance(99, "icp", pose(0.3)))
    assert outcomes[0].confidence == 0.7
    assert (outcomes[1].T_cam_obj[0, 3], outcomes[1].confidence) == (0.201, 0.2)
    assert outcomes[2].code == "no_fit"
