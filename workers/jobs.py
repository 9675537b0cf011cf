"""What several stages do with a job: read it, and turn an error into the failure that the gateway understands."""

from __future__ import annotations

from pathlib import Path

import msgspec

from posekit.errors import BadData, InvalidInput, PoseError, StoreFull, TooLarge, UnitsImplausible
from workers.messages import Failure, FailureKind, Job

_KINDS: tuple[tuple[type[PoseError], FailureKind], ...] = (
    (BadData, "bad_data"),
    (TooLarge, "too_large"),
    (UnitsImplausible, "units"),
    (InvalidInput, "invalid"),
    (StoreFull, "storage"),
)


class GivenUp(Exception):
    """The job's file is gone: nobody waits for the answer."""


def read_job(path: str | None, inline: bytes) -> Job:
    """The job that a part belongs to. Raises GivenUp where its file is gone."""
    try:
        encoded = Path(path).read_bytes() if path else inline
    except FileNotFoundError:
        raise GivenUp from None
    return msgspec.msgpack.decode(encoded, type=Job)


def failure_from(error: PoseError, item_id: str) -> Failure:
    """An error that posekit raised on purpose, as it travels; `internal` for what the client cannot change."""
    kind: FailureKind = next((kind for type_, kind in _KINDS if isinstance(error, type_)), "internal")
    return Failure(part_id=item_id, kind=kind, detail=error.detail, field=error.field)
