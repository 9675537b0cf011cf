"""Refine the network's poses with the geometric engine, for requests that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from posekit.engine import Estimate, Instance, Outcome, Rejection

Ask = Callable[[Sequence[Instance]], list[Outcome]]


def refined(
    instances: Sequence[Instance], *, network: Ask, refiner: Ask, kept: Callable[[int, Rejection], None]
) -> list[Outcome]:
    """Return one outcome per instance, in order: `network` finds poses, `refiner` improves given ones.

    An instance with a pose of its own (`init_T_cam_obj`) needs no search: only the refiner gets it. Of the others,
    those with `refine="icp"` get the refiner's pose and evidence and keep the network's confidence. If the refiner
    rejects a pose, the network's stays, and `kept` is called with the instance's position and the reason.
    """
    outcomes: dict[int, Outcome] = {}
    searched = [index for index, instance in enumerate(instances) if instance.init_T_cam_obj is None]
    outcomes |= zip(searched, network([instances[index] for index in searched]), strict=True)
    given = [index for index, instance in enumerate(instances) if instance.init_T_cam_obj is not None]
    outcomes |= zip(given, refiner([instances[index] for index in given]), strict=True)
    found = {
        index: outcome
        for index, outcome in outcomes.items()
        if index in searched and instances[index].refine == "icp" and isinstance(outcome, Estimate)
    }
    starts = [
        replace(instances[index], init_T_cam_obj=outcome.T_cam_obj, hypotheses=0) for index, outcome in found.items()
    ]
    for (index, outcome), polished in zip(found.items(), refiner(starts), strict=True):
        if isinstance(polished, Estimate):
            outcomes[index] = replace(outcome, T_cam_obj=polished.T_cam_obj, evidence=polished.evidence)
        else:
            kept(index, polished)
    return [outcomes[index] for index in range(len(instances))]
