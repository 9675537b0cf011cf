"""The network's poses, polished by the geometric engine where a request asks for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from posekit.engine import Estimate, Instance, Outcome, Rejection

Ask = Callable[[Sequence[Instance]], list[Outcome]]


def refined(
    instances: Sequence[Instance], *, network: Ask, refiner: Ask, kept: Callable[[int, Rejection], None]
) -> list[Outcome]:
    """One outcome per instance, in order: `network` finds poses, `refiner` starts from poses that are there.

    An instance that brings its own pose (`init_T_cam_obj`) needs no search: it is the refiner's alone. Of the others
    those with `refine="icp"` get the refiner's pose and evidence and keep the network's confidence; what the refiner
    rejects stays as the network left it: `kept` hears of it, with the instance's place and the reason.
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
