"""Judge answers under load: close to the known pose, and the same as when the question was asked alone.

While the load runs, an answer is only opened and its rows are kept, once for each different answer. They are judged
afterwards, or when very many have gathered. A deterministic engine gives few different answers, so this costs next to
nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from pem.bench import here
from pem.bench.here import Symmetries
from pem.bench.sample import Question, Truth

Float64 = npt.NDArray[np.float64]
T = TypeVar("T")
_MOST_KEPT: Final = 2000  # different answers that may wait for their verdict
_MOST_QUOTED: Final = 500  # bytes quoted of an answer that cannot be read


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits beyond which a pose is wrong, or differs from the one given alone."""

    mm: float = 5.0
    deg: float = 5.0
    alone_mm: float = 0.01
    alone_deg: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The verdict on the rows of one answer."""

    detections: int = 0
    poses: int = 0  # rows with a pose
    rejected: int = 0  # rows without one
    wrong: int = 0  # poses that differ from the known one, but were right alone
    wrong_alone: int = 0  # poses that differ from the known one, alone too: an error of the engine
    changed: int = 0  # rows that differ from those given alone
    lost: int = 0  # rows without a pose that had one alone, and not a wrong one


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """The part of an answer that is kept until it is judged."""

    rows: bytes  # digest that identifies the answer among the different ones
    stage_ms: dict[str, float]
    batch_detections: int
    batch_requests: int


class UnreadableAnswer(Exception):
    """The answer is not that of a pose server."""


class Judge:
    """Knows the right answers to a list of questions. Use the same judge for all runs with these questions.

    `compare_alone`: also compare rows with those given to `learn`. Without truths there is nothing else to compare. A
    pose that is missing under load counts either way.
    """

    def __init__(
        self, questions: Sequence[Question], limits: Limits | None = None, *, compare_alone: bool = True
    ) -> None:
        self.questions = list(questions)
        self.limits = limits or Limits()
        self.compare_alone = compare_alone
        self._alone: dict[int, list[Float64 | None]] = {}  # question -> poses (4, 4) in metres
        self._wrong_alone: dict[int, dict[int, str]] = {}  # question -> detection -> description of the error
        self._kept: dict[tuple[int, bytes], bytes] = {}
        self._verdicts: dict[tuple[int, bytes], Verdict] = {}

    @property
    def knows_alone(self) -> bool:
        """Return True if every question was asked alone."""
        return len(self._alone) == len(self.questions)

    @property
    def wrong_alone(self) -> list[str]:
        """Describe the detections that the server gets wrong without load."""
        return [
            f"{self.questions[index].name} (question {index + 1}), detection {detection + 1}: {how}"
            for index, detections in sorted(self._wrong_alone.items())
            for detection, how in sorted(detections.items())
        ]

    @property
    def wrong_alone_share(self) -> float:
        """Return the share of detections with a known pose that are wrong, or have no pose, without load."""
        known = sum(truth.T_cam_obj is not None for question in self.questions for truth in question.truths)
        return sum(map(len, self._wrong_alone.values())) / known if known else 0.0

    def learn(self, index: int, body: bytes, content_type: str) -> None:
        """Learn the answer to question `index` asked alone; raise UnreadableAnswer if it cannot be read."""
        poses = _poses(_open(body, content_type).poses, content_type)
        question = self.questions[index]
        if question.truths and len(poses) != len(question.truths):
            raise UnreadableAnswer(f"{len(question.truths)} detections were sent, {len(poses)} answers came")
        self._alone[index] = poses
        self._wrong_alone[index] = {
            detection: how
            for detection, (truth, pose) in enumerate(zip(question.truths, poses, strict=False))
            if (how := self._off(truth, pose)) is not None
        }

    def hear(self, index: int, body: bytes, content_type: str) -> Heard:
        """Keep an answer to question `index` for its verdict; raise UnreadableAnswer if it cannot be read."""
        answer = _open(body, content_type)
        rows = bytes(answer.poses)
        digest = hashlib.blake2b(rows + content_type.encode(), digest_size=16).digest()
        key = (index, digest)
        if key not in self._verdicts and key not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._judge_kept()
            _poses(answer.poses, content_type)  # raises now for rows that cannot be read
            self._kept[key] = content_type.encode() + b"\0" + rows
        timing = answer.timing or _Timing()
        return Heard(
            rows=digest,
            stage_ms=_stages(timing) if answer.timing else {},
            batch_detections=timing.batch_detections,
            batch_requests=timing.batch_requests,
        )

    def verdict(self, index: int, heard: Heard) -> Verdict:
        """Return the verdict on an answer from `hear`."""
        key = (index, heard.rows)
        if key not in self._verdicts:
            self._judge_kept()
        return self._verdicts[key]

    def _judge_kept(self) -> None:
        for key, kept in self._kept.items():
            content_type, _, rows = kept.partition(b"\0")
            self._verdicts[key] = self._judged(key[0], _poses(msgspec.Raw(rows), content_type.decode()))
        self._kept.clear()

    def _judged(self, index: int, poses: list[Float64 | None]) -> Verdict:
        truths = self.questions[index].truths
        learnt = self._alone.get(index)
        alone = learnt if self.compare_alone else None
        wrong_before = self._wrong_alone.get(index, {})
        found = sum(pose is not None for pose in poses)
        counted = {"detections": len(poses), "poses": found, "rejected": len(poses) - found}
        rows = len(truths) or len(learnt if learnt is not None else poses)
        if len(poses) != rows:  # rows are missing, and nobody knows which
            good = sum(pose is not None and number not in wrong_before for number, pose in enumerate(learnt or ()))
            changed = 0 if alone is None else rows
            return Verdict(**counted, wrong=found, changed=changed, lost=max(0, good - found))
        wrong = wrong_alone = changed = lost = 0
        for detection, pose in enumerate(poses):
            truth = truths[detection] if truths else None
            if alone is not None:
                changed += not self._same(pose, alone[detection], truth.symmetries if truth else None)
            if pose is None:
                had = learnt is not None and learnt[detection] is not None
                lost += had and detection not in wrong_before
            elif truth is not None and self._off(truth, pose) is not None:
                known = detection in wrong_before
                wrong_alone += known
                wrong += not known
        return Verdict(**counted, wrong=wrong, wrong_alone=wrong_alone, changed=changed, lost=lost)

    def _off(self, truth: Truth, pose: Float64 | None) -> str | None:
        """Describe how far a pose is from the known one; None if it is right, or if nothing is known."""
        if truth.T_cam_obj is None:
            return None
        if pose is None:
            return f"the {truth.object_name} got no pose"
        degrees, millimetres = errors(pose, truth.T_cam_obj, truth.symmetries)
        if millimetres <= self.limits.mm and degrees <= self.limits.deg:
            return None
        return f"the {truth.object_name} is {millimetres:.1f} mm and {degrees:.1f} degrees off"

    def _same(self, pose: Float64 | None, before: Float64 | None, symmetries: Symmetries | None) -> bool:
        if pose is None or before is None:
            return pose is before
        degrees, millimetres = errors(pose, before, symmetries)
        return millimetres <= self.limits.alone_mm and degrees <= self.limits.alone_deg


def errors(T_est: Float64, T_true: Float64, symmetries: Symmetries | None) -> tuple[float, float]:
    """Return (degrees, millimetres) between two poses (4, 4) in metres, modulo the symmetries if any are given."""
    if symmetries is not None and (symmetries.discrete or symmetries.continuous):
        return here.find().pose_errors(T_est, T_true, symmetries)  # only pem-server draws objects with symmetries
    delta = T_true[:3, :3].T @ T_est[:3, :3]
    sine = np.linalg.norm(delta - delta.T) / np.sqrt(8)
    degrees = float(np.degrees(np.arctan2(sine, (np.trace(delta) - 1) / 2)))
    return degrees, float(np.linalg.norm(T_est[:3, 3] - T_true[:3, 3]) * 1000)


def error_code(body: bytes, content_type: str) -> str:
    """Return the error code of a failed answer; "unknown" if it has none."""
    try:
        return _decode(body, content_type, _Refusal).error.code
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "unknown"


def refusal_in_words(body: bytes, content_type: str) -> str:
    """Return code, detail and field of a failed answer; for another kind of server, the answer's text."""
    try:
        error = _decode(body, content_type, _Refusal).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = body[:_MOST_QUOTED].decode("utf-8", "replace")
        printable = "".join(letter if letter.isprintable() else " " for letter in text if letter != "\ufffd")
        return "unknown: " + (" ".join(printable.split()) or "the answer says no more")
    detail = f"{error.code}: {error.detail}" if error.detail else error.code
    return f"{detail} (field {error.field})" if error.field else detail


class _Timing(msgspec.Struct):
    decode_ms: float = 0.0
    queue_ms: float = 0.0
    pose_ms: float = 0.0
    respond_ms: float | None = None
    onboard_ms: float | None = None
    ism_ms: float | None = None
    total_ms: float | None = None
    batch_detections: int = 0
    batch_requests: int = 0


class _Answer(msgspec.Struct):
    poses: msgspec.Raw  # decoded only if different from all before
    timing: _Timing | None = None


class _Row(msgspec.Struct):
    status: Literal["ok", "rejected"]
    rotation: list[list[float]] | None = None
    translation: list[float] | None = None  # mm


class _Error(msgspec.Struct):
    code: str
    detail: Any = None
    field: Any = None


class _Refusal(msgspec.Struct):
    error: _Error


def _decode(body: bytes | msgspec.Raw, content_type: str, type_: type[T]) -> T:
    if "msgpack" in content_type:
        return msgspec.msgpack.decode(body, type=type_)
    return msgspec.json.decode(body, type=type_)


def _open(body: bytes, content_type: str) -> _Answer:
    try:
        return _decode(body, content_type, _Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableAnswer(f"the answer is not a pose server's: {error}") from None


def _poses(rows: msgspec.Raw, content_type: str) -> list[Float64 | None]:
    """Return the poses (4, 4) of an answer's rows, metres; None for a row without one."""
    try:
        return [_pose(row) for row in _decode(rows, content_type, list[_Row])]
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise UnreadableAnswer(f"the answer's poses are not a pose server's: {error}") from None


def _pose(row: _Row) -> Float64 | None:
    if row.status != "ok" or row.rotation is None or row.translation is None:
        return None
    T_cam_obj = np.eye(4)
    T_cam_obj[:3, :3] = np.reshape(row.rotation, (3, 3))
    T_cam_obj[:3, 3] = np.reshape(row.translation, 3) / 1000
    return T_cam_obj


def _stages(timing: _Timing) -> dict[str, float]:
    """Return milliseconds by STAGES; time of the total that no stage accounts for was spent in the gateway."""
    named: dict[str, Any] = {
        "queue": timing.queue_ms,
        "decode": timing.decode_ms,
        "pose": timing.pose_ms,
        "respond": timing.respond_ms or 0.0,
    }
    if timing.total_ms is not None:
        others = sum(named.values()) + (timing.onboard_ms or 0.0) + (timing.ism_ms or 0.0)
        named["gateway"] = max(0.0, timing.total_ms - others)
    return named
