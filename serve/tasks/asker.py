"""Who asks, since when and until when; and what the request's log line will say of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from pem.contract import Timing
from serve.telemetry.tracing import Trace


@dataclass
class Notes:
    """What a task tells the log, the metrics and the trace about a request; None where there is nothing to tell."""

    detections: int | None = None
    poses: int | None = None
    rejected: dict[str, int] | None = None  # detections without a pose, by reason
    timing: Timing | None = None
    engine: str | None = None  # what answered
    release: str | None = None  # likewise


@dataclass(frozen=True)
class Asker:
    """A request as its task sees it, apart from what is asked. Moments are monotonic."""

    request_id: str
    client: str  # whose turn it is in the queue
    body_received: float
    deadline: float
    trace: Trace
    notes: Notes = field(default_factory=Notes)
