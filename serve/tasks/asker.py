"""The client of a request, its moments, and the notes for the request's log line."""

from __future__ import annotations

from dataclasses import dataclass, field

from pem.contract import Timing
from serve.telemetry.tracing import Trace


@dataclass
class Notes:
    """A task's notes about a request for the log, the metrics and the trace; None if there is nothing to note."""

    detections: int | None = None
    poses: int | None = None
    rejected: dict[str, int] | None = None  # detections without a pose, by reason
    timing: Timing | None = None
    engine: str | None = None  # the engine that answered
    release: str | None = None  # the release of the engine that answered


@dataclass(frozen=True)
class Asker:
    """A request apart from its question, as the task sees it. Moments are monotonic."""

    request_id: str
    client: str  # whose turn the queue counts
    body_received: float
    deadline: float
    trace: Trace
    notes: Notes = field(default_factory=Notes)
