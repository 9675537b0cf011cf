"""The receipt of a request: how its time was spent. Parts that ran side by side count once; the shares add up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.messages import PartAnswer

_Span = tuple[float, float]  # begin and end, seconds since the epoch


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Disjoint shares of a request's time, in milliseconds.

    Time counts as `pose_ms` while any part of the request was with the engine; else as `decode_ms` while any was being
    decoded; else as `respond_ms` while any was being answered. All other time it waited, in the gateway or between
    stages: `queue_ms`.
    """

    decode_ms: float
    queue_ms: float
    pose_ms: float
    respond_ms: float


def receipt(answers: Sequence[PartAnswer], *, arrived_unix: float, done_unix: float) -> Receipt:
    """Make the receipt of a request that came at `arrived_unix` and was done at `done_unix`, from its parts' reports.

    All stages run on this machine and read one clock. If somebody sets it meanwhile, the shares are wrong, but not
    their sum: time outside the request's does not count.
    """

    def within(spans: Iterable[tuple[float, float]]) -> list[_Span]:
        """Return the parts of (begin, length in ms) between arrival and end."""
        ends = [(begin, begin + length_ms / 1e3) for begin, length_ms in spans]
        return [(max(begin, arrived_unix), min(end, done_unix)) for begin, end in ends]

    pose = within((answer.pose_unix, answer.pose_ms) for answer in answers)
    decode = within((answer.decode_unix, answer.decode_ms) for answer in answers)
    respond = within((answer.respond_unix, answer.respond_ms) for answer in answers)
    pose_s = _covered_s(pose)
    worked_s = _covered_s([*pose, *decode])
    all_s = _covered_s([*pose, *decode, *respond])
    return Receipt(
        decode_ms=(worked_s - pose_s) * 1e3,
        queue_ms=max(0.0, done_unix - arrived_unix - all_s) * 1e3,
        pose_ms=pose_s * 1e3,
        respond_ms=(all_s - worked_s) * 1e3,
    )


def _covered_s(spans: Iterable[_Span]) -> float:
    """Return how long any of these lasted. One that ends before it begins counts as 0."""
    covered_s, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered_s += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered_s
