"""What the load generator's parts tell each other: questions, one sample for each request, runs.

Times are seconds on `time.monotonic()`'s clock unless a name says otherwise; poses are object-to-camera, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pem.bench.here import Symmetries

Format = Literal["msgpack", "json", "multipart"]
STAGES = ("gateway", "queue", "decode", "pose", "respond")  # where a request's time goes, by the answer's own timing


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server under load."""

    url: str  # http://host:port, without a slash at its end
    api_key: str | None = None
    pid: int | None = None  # of its first process, where it runs on this machine: CPU and memory are read from /proc


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What one detection must come to; `T_cam_obj` None: the pose is not known, and nothing is judged."""

    object_name: str
    T_cam_obj: npt.NDArray[np.float64] | None  # (4, 4)
    symmetries: Symmetries | None = None  # None: it has none


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, encoded once and sent as often as the run wants."""

    name: str  # of its kind in tables, "3 masks, 640x480, msgpack"
    body: bytes
    content_type: str
    truths: tuple[Truth, ...]  # one for each detection, in order
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request that was sent, and what came of it."""

    question: str
    client: int
    due: float  # when it was to be sent: in an open loop latency counts from here, so that queueing is not hidden
    sent: float
    done: float
    status: int  # HTTP; 0: no answer (refused connection, broken answer, time-out)
    error: str = ""  # error code of the answer, or of the connection where status is 0
    retry_after_s: float | None = None
    detections: int = 0
    poses: int = 0  # rows with status ok
    wrong: int = 0  # poses that are not the known one, and were when the question was asked alone
    wrong_alone: int = 0  # poses that are not the known one, with or without load
    changed: int = 0  # rows that are others than when the question was asked alone
    lost: int = 0  # rows without a pose that have one, and not a wrong one, when the question is asked alone
    rejected: int = 0  # rows without a pose
    stage_ms: dict[str, float] = field(default_factory=dict)  # by STAGES; empty where the answer does not say
    batch_detections: int = 0
    batch_requests: int = 0

    @property
    def latency_s(self) -> float:
        """From when it was due to the answer's last byte."""
        return self.done - self.due

    @property
    def ok(self) -> bool:
        """Answered with 200."""
        return self.status == 200


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One process over a run."""

    pid: int
    name: str  # its stage where it is one of ours ("pose", "decode", "gateway"...), else the program's name
    cpu_s: float  # user and system, during the measured part
    rss_mb: float  # resident at the end
    rss_peak_mb: float  # the largest seen


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU over a run, as nvidia-smi tells it."""

    name: str  # its index and its name
    busy: float  # share of the time in which something ran on it, 0 to 1
    memory_peak_mb: float  # of all processes on it


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured stretch of load: the warm-up's samples are not in it."""

    mode: Literal["closed", "open"]
    clients: int  # closed: at a time; open: the most that were open at a time
    rate_hz: float | None  # open: requests a second offered
    begun: float
    ended: float
    samples: list[Sample]
    carried: list[Sample] = field(default_factory=list)  # open: due in the warm-up, done in the measured part
    usage: list[Usage] = field(default_factory=list)
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # what /metrics' counters grew by: passes, their detections...
    gpus: list[Gpu] = field(default_factory=list)
    load_generator_cpu_s: float = 0.0
    wrong_alone: list[str] = field(default_factory=list)  # detections that are wrong without load, in words
    wrong_alone_share: float = 0.0  # of all detections whose pose is known

    @property
    def seconds(self) -> float:
        """How long it was measured."""
        return self.ended - self.begun
