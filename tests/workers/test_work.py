"""A part inside the pose stage: which of its passes it is answered with."""

from __future__ import annotations

import time
from typing import Any

from posekit.engine import Rejection
from workers.messages import Crop, Cut, Part, PassRecord, Solved
from workers.work import Work


def work(count: int = 2, **changes: Any) -> Work:
    crops = [Crop(index=index, bbox=(0.0, 0.0, 1.0, 1.0)) for index in range(count)]
    usual = {
        "part": Part(part_id="r/0", start=0, stop=count),
        "crops": crops,
        "engine": "geometric",
        "refine": "icp",
        "hypotheses": 0,
        "min_score": 0.0,
        "deadline_unix": time.time() + 60,
    }
    return Work(Cut(**(usual | changes)))


def record(detections: int, requests: int) -> PassRecord:
    pass_id = f"{detections}-{requests}"
    return PassRecord(engine="geometric", detections=detections, requests=requests, seconds=0.1, pass_id=pass_id)


def test_a_part_tells_its_largest_pass_and_all_of_them_in_order() -> None:
    part = work(3)
    passes = [record(2, 1), record(7, 3), record(4, 2)]
    for item, one in zip(part.items("geometric"), passes, strict=True):
        item.note(Rejection(code="no_fit", detail="nothing matches"), one)
    answer = part.answer()
    assert isinstance(answer, Solved)
    assert (answer.batch_detections, answer.batch_requests) == (7, 3)
    assert answer.pass_ids == [one.pass_id for one in passes]


def test_a_part_that_was_late_once_stays_late() -> None:
    part = work(deadline_unix=time.time() - 1)
    assert not part.in_time()
    part.cut = work().cut
    assert not part.in_time()
    assert not isinstance(part.answer(), Solved)
