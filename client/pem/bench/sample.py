"""Types shared by the parts of the load generator: questions, one sample for each request, runs.

Times are seconds on `time.monotonic()`'s clock unless a name says otherwise; poses are object-to-camera, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pem.bench.here import Symmetries

Format = Literal["msgpack", "json", "multipart"]
STAGES = ("gateway", "queue", "decode", "pose", "respond")  # the parts of a request's time, as the answer reports them


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server under load."""

    url: str  # http://host:port, without a trailing slash
    api_key: str | None = None
    pid: int | None = None  # of its first process, if it runs on this machine: CPU and memory are read from /proc


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The right answer for one detection; `T_cam_obj` None: the pose is unknown, and nothing is judged."""

    object_name: str
    T_cam_obj: npt.NDArray[np.float64] | None  # (4, 4)
    symmetries: Symmetries | None = None  # None: no symmetry


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, encoded once and sent as often as the run wants."""

    name: str  # its kind in tables, "3 masks, 640x480, msgpack"
    body: bytes
    content_type: str
    truths: tuple[Truth, ...]  # one for each detection, in order
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request that was sent, and its result."""

    question: str
    client: int
    due: float  # when it should be sent: in an open loop latency counts from here, so that queueing is not hidden
    sent: float
    done: float
    status: int  # HTTP; 0: no answer (refused connection, broken answer, time-out)
    error: str = ""  # error code of the answer, or of the connection if status is 0
    retry_after_s: float | None = None
    detections: int = 0
    poses: int = 0  # rows with status ok
    wrong: int = 0  # poses that differ from the known one, but were right when asked alone
    wrong_alone: int = 0  # poses that differ from the known one, with or without load
    changed: int = 0  # rows that differ from those given when the question was asked alone
    lost: int = 0  # rows without a pose that had one, and not a wrong one, when the question was asked alone
    rejected: int = 0  # rows without a pose
    stage_ms: dict[str, float] = field(default_factory=dict)  # by STAGES; empty if the answer does not report it
    batch_detections: int = 0
    batch_requests: int = 0

    @property
    def latency_s(self) -> float:
        """Return the time from when it was due to the answer's last byte."""
        return self.done - self.due

    @property
    def ok(self) -> bool:
        """Return True if it was answered with 200."""
        return self.status == 200


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One process during a run."""

    pid: int
    name: str  # its stage for our own processes ("pose", "decode", "gateway"...), else the program's name
    cpu_s: float  # user and system, during the measured part
    rss_mb: float  # resident at the end
    rss_peak_mb: float  # the largest reading


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU during a run, as nvidia-smi reports it."""

    name: str  # index and name
    busy: float  # share of the time in which something ran on it, 0 to 1
    memory_peak_mb: float  # of all processes on it


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured stretch of load, without the samples of the warm-up."""

    mode: Literal["closed", "open"]
    clients: int  # closed: at a time; open: the largest number open at a time
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
    wrong_alone: list[str] = field(default_factory=list)  # descriptions of the detections that are wrong without load
    wrong_alone_share: float = 0.0  # share of the detections with a known pose

    @property
    def seconds(self) -> float:
        """Return the length of the measured part."""
        return self.ended - self.begun
